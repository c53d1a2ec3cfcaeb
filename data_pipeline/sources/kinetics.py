"""Kinetics-400, 600 and 700 (Kay et al. 2017, arXiv:1705.06950) by their csv files. Torch-free.

    train.csv, val.csv, …     label,youtube_id,time_start,time_end,split

The clip of a row is a file ID_START_END with six digits each, or just ID, wherever it lies below ``path``: in folders
by split and label, or flat. Videos vanish from the web, so that rows without a file are normal; they are counted.
``validate`` or ``val`` is the validation split; test rows, some of them without labels, are left out.
"""

import csv
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_pipeline.config import KineticsSource
from data_pipeline.decode import VIDEO_EXTENSIONS
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.source import SourceSample, Split, make_key, media_files

log = logging.getLogger(__name__)

_SPLITS: dict[str, Split] = {"train": "train", "validate": "val", "val": "val"}
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


class _Row(NamedTuple):
    label: str
    youtube_id: str
    start: int
    end: int
    split: Split


def walk(config: KineticsSource) -> list[SourceSample]:
    """The clips that are there, in the order of the csv files. UsageError if there are none."""
    if not config.path.is_dir():
        raise UsageError(f"{config.path}: no such folder; source.path must name the folder of the videos")
    files = {path.stem: path for path in reversed(media_files(config.path, VIDEO_EXTENSIONS))}
    listed, samples, taken = 0, [], set()
    for row in _rows(config):
        listed += 1
        path = files.get(f"{row.youtube_id}_{row.start:06d}_{row.end:06d}") or files.get(row.youtube_id)
        if path is None or path in taken:  # one file ID.mp4 cannot be the clips of several rows
            continue
        taken.add(path)
        name = path.relative_to(config.path).as_posix()
        about = {"youtube_id": row.youtube_id, "time_start": row.start, "time_end": row.end}
        samples.append(SourceSample(make_key(name), row.split, row.label, name, about, path))
    if not samples:
        raise UsageError(
            f"{config.path}: none of the {listed} listed clips is there; their files must be called "
            "ID_START_END.mp4 (ID_000010_000020.mp4) or ID.mp4, in any sub-folder"
        )
    log.info("%s: %d of %d listed clips are there", config.path, len(samples), listed)
    if left_out := len(files) - len(taken):
        log.warning("%s: %d videos are in no train or validation list and are left out", config.path, left_out)
    return samples


def describe(config: KineticsSource, samples: Sequence[SourceSample]) -> Description:
    """With the classes of all rows, so that their numbers do not depend on which videos could be downloaded."""
    return Description(kind="clips", classes=sorted({row.label for row in _rows(config)}))


def _rows(config: KineticsSource) -> Iterator[_Row]:
    where = config.annotations or config.path
    files = [where] if where.is_file() else sorted([*where.glob("*.csv"), *where.glob("annotations/*.csv")])
    if not files:
        raise UsageError(
            f"{where}: no csv file; get the annotations of https://github.com/cvdfoundation/kinetics-dataset and name "
            "them as source.annotations"
        )
    for file in files:
        with file.open(newline="") as text:
            reader = csv.DictReader(text)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing == ["label"]:  # a test list
                continue
            if missing:
                raise UsageError(f"{file}: no column {missing[0]}, which annotations have; move it elsewhere")
            for row in reader:
                if row["split"] not in _SPLITS:
                    continue
                try:
                    times = [int(float(row[column])) for column in ("time_start", "time_end")]
                except (TypeError, ValueError):
                    raise UsageError(f"{file}: line {reader.line_num} has no times in seconds; get it anew") from None
                yield _Row(row["label"], row["youtube_id"], *times, _SPLITS[row["split"]])
