"""UCF-101 (Soomro, Zamir & Shah 2012, arXiv:1212.0402) with the published train and test lists. Torch-free.

    path/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    path/ucfTrainTestlist/trainlist01.txt      ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
    path/ucfTrainTestlist/testlist01.txt       ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    path/ucfTrainTestlist/classInd.txt         1 ApplyEyeMakeup

The lists of fold 1, 2 or 3 are the split (the test list is ``val``); they may also lie beside ``path``. Classes have
the numbers of classInd.txt, less one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import Ucf101Source
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.source import SourceSample, labels, make_key, media_files

log = logging.getLogger(__name__)

_FOLDER = "ucfTrainTestlist"


def walk(config: Ucf101Source) -> list[SourceSample]:
    """The listed videos that are there, in the order of the lists. UsageError if most of them are not."""
    lists = _lists(config)
    listed = {
        name: split
        for split, kind in (("train", "trainlist"), ("val", "testlist"))
        for name in _names(lists / f"{kind}0{config.fold}.txt")
    }
    paths = {path.relative_to(config.path).as_posix(): path for path in media_files(config.path, ("avi",))}
    missing = [name for name in listed if name not in paths]
    if 2 * len(missing) > len(listed):
        raise UsageError(
            f"{config.path}: {len(missing)} of the {len(listed)} videos that {lists} lists are not there, such as "
            f"{missing[0]}; source.path must name the folder of the class folders (UCF-101)"
        )
    if missing:
        log.warning("%s: %d listed videos are not there, such as %s", config.path, len(missing), missing[0])
    if unlisted := [name for name in paths if name not in listed]:
        log.warning("%s: %d videos are in no list and are left out, such as %s", lists, len(unlisted), unlisted[0])
    return [
        SourceSample(make_key(name), split, name.split("/")[0], name, path=paths[name])
        for name, split in listed.items()
        if name in paths
    ]


def describe(config: Ucf101Source, samples: Sequence[SourceSample]) -> Description:
    """With the classes of classInd.txt, where it is there. UsageError if a video's class is not among them."""
    file, found = _lists(config) / "classInd.txt", labels(samples)
    if not file.is_file():
        return Description(kind="clips", classes=found)
    rows = sorted((int(number), name) for number, name in (line.split() for line in _lines(file)))
    classes = [name for _, name in rows]
    if strange := set(found) - set(classes):
        raise UsageError(f"{file}: has no class {min(strange)}, though the lists do; take all lists from one archive")
    return Description(kind="clips", classes=classes)


def _lists(config: Ucf101Source) -> Path:
    if not config.path.is_dir():
        raise UsageError(f"{config.path}: no such folder; source.path must name the folder of the class folders")
    places = [config.lists] if config.lists else [config.path / _FOLDER, config.path.parent / _FOLDER]
    for place in places:
        if (place / f"trainlist0{config.fold}.txt").is_file():
            return place
    raise UsageError(
        f"{' or '.join(map(str, places))}: no trainlist0{config.fold}.txt; unpack UCF101TrainTestSplits-"
        "RecognitionTask.zip of https://www.crcv.ucf.edu/data/UCF101.php there, or name its folder as source.lists"
    )


def _names(file: Path) -> list[str]:
    """The first words of a list's lines: training lists have the class's number behind them."""
    if not file.is_file():
        raise UsageError(f"{file}: missing; take all lists from one archive")
    return [line.split()[0] for line in _lines(file)]


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()]
