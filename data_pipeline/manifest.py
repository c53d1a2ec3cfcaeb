"""What a shard set holds: manifest.json, and NAME.json beside every NAME.tar. Torch-free.

A shard set is a folder of tars. A *window* is a run of bytes of one tar that holds whole samples: the unit that is
read at once and shuffled. Merging folds the NAME.json of every shard into manifest.json, always to the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.config import ClipConfig
from data_pipeline.disk import write_json
from data_pipeline.errors import UsageError, UserError

FORMAT = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(NamedTuple):
    """``bytes`` bytes at ``offset`` of a tar, which hold ``count`` samples."""

    offset: int
    bytes: int
    count: int


class Shard(_Record):
    """One tar: ``name``.tar, of ``bytes`` bytes. Its windows follow each other from its beginning; their sizes stand
    in columns, so that a manifest of a million windows is read in a fraction of a second."""

    name: str
    samples: int
    bytes: int
    sha256: str
    window_bytes: list[int]
    window_samples: list[int]

    @property
    def windows(self) -> list[Window]:
        offsets = accumulate(self.window_bytes, initial=0)
        return [Window(*window) for window in zip(offsets, self.window_bytes, self.window_samples, strict=False)]


class Moments(_Record):
    """Of the values of each channel, over ``count`` values: mean, and sum of squared distances from it."""

    count: int
    mean: list[float]
    m2: list[float]

    def __add__(self, other: "Moments") -> "Moments":
        """Of both together (Chan, Golub & LeVeque 1983, equation 2.1)."""
        count = self.count + other.count
        pairs = list(zip(self.mean, other.mean, strict=True))
        return Moments(
            count=count,
            mean=[a + (b - a) * other.count / count for a, b in pairs],
            m2=[
                p + q + (b - a) ** 2 * self.count * other.count / count
                for p, q, (a, b) in zip(self.m2, other.m2, pairs, strict=True)
            ],
        )


class Description(_Record):
    """What all shards of a set have in common.

    kind clips: samples are encoded videos, or arrays (t, h, w, c) of type ``dtype`` whose channels have names and
    units; latents: samples are token ids of shape ``grid`` (T', H', W'), below ``codebook_size``, or floats (C, T',
    H', W') where that is none, made by the tokenizer whose hash is ``fingerprint`` from clips cut by ``clip``.
    """

    kind: Literal["clips", "latents"]
    classes: list[str] = []
    dtype: Literal["uint8", "float32"] = "uint8"
    channels: list[str] = []
    units: list[str] = []
    fingerprint: str | None = None
    grid: tuple[int, int, int] | None = None
    codebook_size: int | None = None
    clip: ClipConfig | None = None


class ShardRecord(_Record):
    """Contents of NAME.json: the shard, the set it is part of, and a hash of what it was asked to hold."""

    shard: Shard
    set: Description
    shards: int  # of the whole set
    plan: str
    skipped: int = 0  # samples left out because they could not be read
    moments: Moments | None = None  # of arrays that are physical fields


class Manifest(Description):
    """Contents of manifest.json. ``shards`` are in the order of their names; shards without samples are left out."""

    format: Literal[2] = FORMAT
    samples: int
    moments: Moments | None = None
    skipped: int = 0  # left out because they could not be read
    shards: list[Shard]


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a shard set. UsageError where there is none or it is of another format."""
    path = Path(folder) / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_text())
    except FileNotFoundError:
        where = "the folder does not exist" if not Path(folder).exists() else "there is no manifest.json in it"
        raise UsageError(f"{folder}: no shard set here: {where}; `stpredict shard` and `encode` make them") from None
    except ValidationError as error:
        raise UsageError(f"{path}: not a manifest of format {FORMAT}: {error.errors()[0]['msg']}") from None


def read_record(folder: Path, index: int) -> ShardRecord | None:
    """NAME.json of one shard, or None where the shard is not finished."""
    path = folder / f"{shard_name(index)}.json"
    try:
        record = ShardRecord.model_validate_json(path.read_text())
        finished = path.with_suffix(".tar").stat().st_size == record.shard.bytes
    except (FileNotFoundError, ValidationError):
        return None
    return record if finished else None


def clear(folder: Path, indices: list[int], shards: int) -> None:
    """Makes room for the shards numbered ``indices`` of a set of ``shards``: removes the manifest and what earlier or
    killed runs left of them. Processes clear only their own shards, so that none removes another's work."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in [*folder.glob("shard-*"), *folder.glob(".shard-*.tmp")]:
        number = int(path.name.lstrip(".").removeprefix("shard-").split(".")[0])
        if number in indices or (number >= shards and 0 in indices):
            path.unlink(missing_ok=True)


def merge(folder: str | Path) -> Manifest:
    """Folds the NAME.json of every shard into manifest.json.

    UserError if a part of the set is missing, or no sample could be read."""
    folder = Path(folder)
    first = read_record(folder, 0)
    if first is None:
        raise UserError(f"{folder}: shard {shard_name(0)} is missing or unfinished; run the job that writes it again")
    records = [read_record(folder, index) for index in range(first.shards)]
    missing = [shard_name(index) for index, record in enumerate(records) if record is None]
    strange = [shard_name(index) for index, record in enumerate(records) if record and record.set != first.set]
    if missing or strange:
        problem = f"missing or unfinished: {_some(missing)}" if missing else f"of another set: {_some(strange)}"
        raise UserError(f"{folder}: of {first.shards} shards {problem}; run the job that writes them again")
    shards = [record.shard for record in records if record.shard.samples]
    samples, skipped = sum(shard.samples for shard in shards), sum(record.skipped for record in records)
    parts = [record.moments for record in records if record.moments is not None]
    moments = sum(parts[1:], parts[0]) if parts else None
    manifest = Manifest(**dict(first.set), samples=samples, skipped=skipped, moments=moments, shards=shards)
    if not shards:
        raise UserError(
            f"{folder}: none of the {skipped} samples could be read; the log gives the reason for each. "
            "Add readable ones, or say which are whose by folders named train and val"
        )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json", exclude_none=True))
    return manifest


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Reads every shard of a set and returns what is wrong with it, one line each; empty if all is well."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    for done, shard in enumerate(manifest.shards):
        problems += (f"{shard.name}.tar: {problem}" for problem in _problems(folder, shard))
        if progress:
            progress(done + 1, len(manifest.shards))
    if manifest.samples != sum(shard.samples for shard in manifest.shards):
        problems.append(f"manifest.json: says {manifest.samples} samples, its shards say otherwise")
    return problems


def _problems(folder: Path, shard: Shard) -> Iterable[str]:
    path = folder / f"{shard.name}.tar"
    if not path.exists():
        yield "missing"
        return
    if (size := path.stat().st_size) != shard.bytes:
        yield f"{size} bytes, {shard.bytes} expected"
    elif file_sha256(path) != shard.sha256:
        yield "sha256 differs from the manifest's"
    if shard.samples != sum(shard.window_samples) or shard.bytes < sum(shard.window_bytes):
        yield f"{shard.samples} samples, its windows say otherwise"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_hash(*parts: Any) -> str:
    """A hash of what a shard is asked to hold; ``parts`` are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
