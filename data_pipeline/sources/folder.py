"""Any folder of videos. Torch-free.

    path/CLASS/**/VIDEO.mp4                      a share of the videos is held out
    path/train/CLASS/**/VIDEO.mp4, path/val/…    the split is given
    path/VIDEO.mp4                               no class

Files whose names begin with a dot are ignored. Files are stored in the shards under their own extension.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_pipeline.config import FolderSource
from data_pipeline.errors import UsageError
from data_pipeline.seeding import share
from data_pipeline.sources.source import SourceSample, Split

log = logging.getLogger(__name__)

EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")


def walk(config: FolderSource) -> list[SourceSample]:
    """The videos under ``config.path`` in the order of their names. UsageError if there are none."""
    root = config.path
    if not root.exists():
        raise UsageError(f"{root}: no such folder; source.path must name a folder of videos")
    if not root.is_dir():
        raise UsageError(f"{root}: is a file; source.path must name a folder of videos")
    given = [split for split in ("train", "val") if (root / split).is_dir()]
    if len(given) == 1:
        missing = "val" if given == ["train"] else "train"
        raise UsageError(f"{root}: has {given[0]}/ but no {missing}/; add it, or give {root / given[0]} as the path")
    if given:
        others = sorted(path.name for path in root.iterdir() if path.name not in given and path.name[0] != ".")
        if others:
            log.warning("%s: only train/ and val/ are read; left out: %s", root, ", ".join(others[:10]))
        samples = [sample for split in given for sample in _videos(root, root / split, split)]
    else:
        samples = _hold_out(_videos(root, root, "train"), config.validation_fraction)
    if not any(sample.split == "train" for sample in samples):
        where = root / "train" if given else root
        raise UsageError(
            f"{where}: no videos found; looked for {', '.join('.' + e for e in EXTENSIONS)} in all sub-folders"
        )
    if repeated := [key for key, count in Counter(sample.key for sample in samples).items() if count > 1]:
        raise UsageError(f"{root}: two videos get the same key {repeated[0]}; rename one of them")
    return samples


def _videos(root: Path, top: Path, split: Split) -> list[SourceSample]:
    """All videos below ``top``; their names are relative to ``root``, their class is the folder just below ``top``."""
    paths = []
    for folder, _, files in os.walk(top, followlinks=True):
        paths += (Path(folder, file) for file in files if _is_video(file))
    return [
        SourceSample(
            key=_key(name := path.relative_to(root).as_posix()),
            path=path,
            split=split,
            label=inside[0] if len(inside := path.relative_to(top).parts) > 1 else None,
            name=name,
        )
        for path in sorted(paths)
    ]


def _is_video(file: str) -> bool:
    return not file.startswith(".") and file.lower().endswith(tuple(f".{extension}" for extension in EXTENSIONS))


def _key(name: str) -> str:
    """The name as WebDataset bears it, made unique by a hash: a/b.c.avi and a_b/c.avi must not become one sample."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0])[-60:]
    return f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _hold_out(samples: list[SourceSample], fraction: float) -> list[SourceSample]:
    """Moves a share of the videos to the validation split, by a hash of the key: a video that is added moves no other.

    Of two videos or more at least one is held out and at least one is not.
    """
    if not fraction or len(samples) < 2:
        return samples
    by_share = sorted(samples, key=lambda sample: share(sample.key))
    held_out = {sample.key for sample in by_share[1:-1] if share(sample.key) < fraction} | {by_share[0].key}
    return [replace(sample, split="val") if sample.key in held_out else sample for sample in samples]
