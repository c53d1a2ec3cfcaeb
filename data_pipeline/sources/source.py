"""A data set family as a list of samples: one module each, picked here by the kind of its config. Torch-free.

A module has ``walk(config)``, which lists the samples; ``describe(config, samples)`` where it knows more of the set
than the samples say; and ``read(config, sample)`` where a sample is not simply its file.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.config import (
    ArraysSource,
    FolderSource,
    KineticsSource,
    KthSource,
    MovingDigitsSource,
    NetcdfSource,
    Source,
    Split,
    TaxiBjSource,
    Ucf101Source,
)
from data_pipeline.decode import EXTENSIONS
from data_pipeline.manifest import Description
from data_pipeline.seeding import share


@dataclass(frozen=True)
class SourceSample:
    """One sample of a data set: a plain value, which ranks send each other and which decides what a shard holds.

    ``key`` is unique in the data set, always the same and without a dot (WebDataset cuts names there); ``name`` is
    what the data set calls the sample; ``label`` its class, where it has one; ``metadata`` goes into KEY.json.
    ``path`` is the file it comes from, if it comes from one; where it comes from several, the first, and ``more_paths``
    the others; ``item`` (a JSON value) says which part of that, or what else is to be made; ``bytes`` is about
    what it will take, where that is not the size of the file.
    """

    key: str
    split: Split
    label: str | None
    name: str
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    item: Any = None
    bytes: int | None = None
    more_paths: tuple[Path, ...] = ()


def walk(config: Source) -> list[SourceSample]:
    """The samples of all splits, in a fixed order. UsageError says what is missing, where, and what to do."""
    from data_pipeline.sources import arrays, folder, kinetics, kth, moving_digits, netcdf, taxibj, ucf101

    match config:
        case FolderSource():
            return folder.walk(config)
        case Ucf101Source():
            return ucf101.walk(config)
        case KineticsSource():
            return kinetics.walk(config)
        case KthSource():
            return kth.walk(config)
        case ArraysSource():
            return arrays.walk(config)
        case NetcdfSource():
            return netcdf.walk(config)
        case TaxiBjSource():
            return taxibj.walk(config)
        case MovingDigitsSource():
            return moving_digits.walk(config)


def describe(config: Source, samples: Sequence[SourceSample]) -> Description:
    """What all of the set's samples have in common: its classes in the order of their numbers, and what arrays hold."""
    from data_pipeline.sources import arrays, kinetics, kth, netcdf, taxibj, ucf101

    match config:
        case Ucf101Source():
            return ucf101.describe(config, samples)
        case KineticsSource():
            return kinetics.describe(config, samples)
        case KthSource():
            return kth.describe(config, samples)
        case ArraysSource():
            return arrays.describe(config, samples)
        case NetcdfSource():
            return netcdf.describe(config, samples)
        case TaxiBjSource():
            return taxibj.describe(config, samples)
        case _:
            return Description(kind="clips", classes=labels(samples))


def read(config: Source, sample: SourceSample, scratch: Path | None = None) -> tuple[str, bytes]:
    """The sample's member of the shard: its extension and its bytes. What is unpacked once for many samples is kept in
    the folder ``scratch``, which need not be there yet; without it nothing is kept.

    OSError or DecodeError if it cannot be read; UserError where ``scratch`` has no room."""
    from data_pipeline.sources import arrays, moving_digits, netcdf, taxibj

    match config:
        case ArraysSource():
            return arrays.read(config, sample, scratch)
        case NetcdfSource():
            return netcdf.read(config, sample)
        case TaxiBjSource():
            return taxibj.read(config, sample)
        case MovingDigitsSource():
            return moving_digits.read(config, sample)
        case _:
            return sample.path.suffix[1:].lower(), sample.path.read_bytes()


def labels(samples: Sequence[SourceSample]) -> list[str]:
    return sorted({sample.label for sample in samples if sample.label is not None})


def make_key(name: str) -> str:
    """A name as WebDataset bears it, made unique by a hash: a/b.c.avi and a_b/c.avi must not become one sample."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", str(PurePosixPath(name).with_suffix("")))[-60:]
    return f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def hold_out(samples: list[SourceSample], fraction: float) -> list[SourceSample]:
    """Moves a share of the samples to the validation split, by a hash of the key: one that is added moves no other.

    Of two samples or more at least one is held out and at least one is not.
    """
    if not fraction or len(samples) < 2:
        return samples
    by_share = sorted(samples, key=lambda sample: share(sample.key))
    held_out = {sample.key for sample in by_share[1:-1] if share(sample.key) < fraction} | {by_share[0].key}
    return [replace(sample, split="val") if sample.key in held_out else sample for sample in samples]


def is_media(name: str, extensions: tuple[str, ...] = EXTENSIONS) -> bool:
    """Whether a file is a video or an image by its name; those that begin with a dot are what systems leave behind."""
    return not name.startswith(".") and name.lower().endswith(tuple(f".{extension}" for extension in extensions))


def media_files(top: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """All videos and images below ``top``, in the order of their names; links to folders are followed."""
    found = []
    for folder, _, files in os.walk(top, followlinks=True):
        found += (Path(folder, file) for file in files if is_media(file, extensions))
    return sorted(found)
