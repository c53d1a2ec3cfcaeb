"""Any folder of videos or images. Torch-free.

    path/CLASS/**/VIDEO.mp4                      a share of the videos is held out
    path/train/CLASS/**/VIDEO.mp4, path/val/…    the split is given, with path/test/… or without
    path/VIDEO.mp4                               no class

Files whose names begin with a dot are ignored. Files are stored in the shards under their own extension; an image is a
video of one frame.
"""

import logging
from collections import Counter
from pathlib import Path

from data_pipeline.config import SPLITS, FolderSource
from data_pipeline.decode import EXTENSIONS
from data_pipeline.errors import UsageError
from data_pipeline.sources.source import SourceSample, Split, hold_out, make_key, media_files

log = logging.getLogger(__name__)


def walk(config: FolderSource) -> list[SourceSample]:
    """The videos under ``config.path`` in the order of their names. UsageError if there are none."""
    root = config.path
    if not root.exists():
        raise UsageError(f"{root}: no such folder; source.path must name a folder of videos")
    if not root.is_dir():
        raise UsageError(f"{root}: is a file; source.path must name a folder of videos")
    given = [split for split in SPLITS if (root / split).is_dir()]
    needed = {"train", "val"}
    if len(one := needed & set(given)) == 1:
        (there,), (missing,) = one, needed - one
        raise UsageError(f"{root}: has {there}/ but no {missing}/; add it, or give {root / there} as the path")
    if not one:  # a class of the name test is a class
        given = []
    if given:
        others = sorted(path.name for path in root.iterdir() if path.name not in given and path.name[0] != ".")
        if others:
            log.warning("%s: only train/, val/ and test/ are read; left out: %s", root, ", ".join(others[:10]))
        samples = [sample for split in given for sample in _videos(root, root / split, split)]
    else:
        samples = hold_out(_videos(root, root, "train"), config.validation_fraction)
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
    return [
        SourceSample(
            key=make_key(name := path.relative_to(root).as_posix()),
            split=split,
            label=inside[0] if len(inside := path.relative_to(top).parts) > 1 else None,
            name=name,
            path=path,
        )
        for path in media_files(top)
    ]
