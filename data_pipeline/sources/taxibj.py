"""TaxiBJ: flows of taxis into and out of 32 x 32 cells of Beijing, every half hour. Torch-free.

Published with Zhang, Zheng & Qi 2017 (arXiv:1610.00081):

    path/dataset.npz                        X_train, Y_train, X_test, Y_test: (n, 4, 2, 32, 32) in [-1, 1]
    path/BJ13_M32x32_T30_InOut.h5           data (t, 2, 32, 32) in trips, date b'2013070101': day, half hour 1 to 48;
    path/BJ14_…, BJ15_…, BJ16_…             the original files, with whole days missing

Samples are (t, h, w, 2) in float32, between 0 and 1: (x + 1) / 2 of the first layout, which papers on video prediction
use (X and Y are joined to 8 frames); of the second, trips less their least over their greatest number of the time
before the test, negative ones taken as 0, in every sequence of 8 half hours without a gap. KEY.json says the range.

Validation is the last share of the sequences for training; those of the others that reach into it are left out.
"""

import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from einops import rearrange

from data_pipeline.arrays import npy_bytes
from data_pipeline.config import TaxiBjSource
from data_pipeline.decoders import one_line
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.arrays import array_header, open_array
from data_pipeline.sources.cuts import splits_in_time
from data_pipeline.sources.source import SourceSample, make_key

if TYPE_CHECKING:
    import h5py

_FRAMES = 8  # of a sequence: four to see and four to predict
_A_DAY = 48  # half hours
_HALF_HOUR = np.timedelta64(30, "m")


def walk(config: TaxiBjSource) -> list[SourceSample]:
    """The sequences of each split in their order. UsageError if neither layout is there, or a file is damaged."""
    root = config.path
    archive = root if root.suffix == ".npz" else root / "dataset.npz"
    if archive.is_file():
        return _walk_npz(config, archive)
    files = sorted(root.glob("BJ*_M32x32_T30_InOut.h5")) if root.is_dir() else [root] if root.suffix == ".h5" else []
    if not any(file.is_file() for file in files):
        raise UsageError(
            f"{root}: neither dataset.npz nor BJ13_M32x32_T30_InOut.h5, BJ14, … there; correct source.path"
        )
    return _walk_h5(config, files)


def describe(config: TaxiBjSource, samples: Sequence[SourceSample]) -> Description:
    return Description(kind="clips", dtype="float32", channels=["inflow", "outflow"], units=["of the range"] * 2)


def read(config: TaxiBjSource, sample: SourceSample) -> tuple[str, bytes]:
    """An .npy float32 (t, h, w, 2). DecodeError where the file is damaged, or values are infinite or not a number."""
    item = sample.item
    try:
        if sample.path.suffix == ".npz":
            parts = [_member(sample.path, f"{part}_{item['part']}")[item["index"]] for part in "XY"]
            frames = (np.concatenate(parts) + 1) / 2
        else:
            least, greatest = sample.metadata["range"]
            flows = _opened(sample.path)["data"][item["first"] : item["first"] + _FRAMES]
            frames = (np.maximum(flows, 0) - least) / (greatest - least)
    except (ValueError, EOFError, OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DecodeError(f"its array cannot be read: {one_line(error)}") from None
    if not np.isfinite(frames).all():
        raise DecodeError("has values that are infinite or not a number")
    frames = rearrange(frames, "t c h w -> t h w c")
    return "npy", npy_bytes(np.ascontiguousarray(frames, dtype=np.float32))


_member = lru_cache(maxsize=2)(open_array)  # X and Y of one part


def _walk_npz(config: TaxiBjSource, path: Path) -> list[SourceSample]:
    counts = {}
    for part in ("train", "test"):
        try:
            seen, predicted = (array_header(path, f"{name}_{part}")[0] for name in "XY")
        except UsageError:
            raise UsageError(
                f"{path}: cannot be read, or lacks X_{part} or Y_{part}; TaxiBJ's dataset.npz holds X_train, Y_train, "
                "X_test and Y_test: get it anew"
            ) from None
        if (
            len(seen) != 5
            or len(predicted) != 5
            or seen[:1] + seen[2:] != predicted[:1] + predicted[2:]
            or seen[2] != 2
        ):
            raise UsageError(
                f"{path}: X_{part} is {seen} and Y_{part} {predicted}; both should be (n, 4, 2, 32, 32): take TaxiBJ's "
                "dataset.npz, or the arrays source for other files"
            )
        counts[part], shape = seen[0], (seen[1] + predicted[1], *seen[2:])
    size = 4 * int(np.prod(shape))
    # Each entry is taken to begin one step behind the one before it: so many share frames.
    splits = splits_in_time(range(counts["train"]), shape[0], config.validation_fraction)
    places = [("train", index, split) for index, split in enumerate(splits) if split]
    places += [("test", index, "test") for index in range(counts["test"])]
    samples = []
    for part, index, split in places:
        name, item = f"{part}/{index:06d}", {"part": part, "index": index}
        samples.append(SourceSample(make_key(name), split, None, name, {"interval_h": 0.5}, path, item, size))
    return samples


class _Recording(NamedTuple):
    path: Path
    times: np.ndarray  # datetime64[m] of each step's beginning
    size: int  # bytes of a sequence that is stored


def _walk_h5(config: TaxiBjSource, files: list[Path]) -> list[SourceSample]:
    recordings = sorted((_recording(file) for file in files), key=lambda recording: recording.times[0])
    times = np.concatenate([recording.times for recording in recordings])
    if len(back := np.flatnonzero(np.diff(times) <= np.timedelta64(0))):
        raise UsageError(f"{config.path}: {times[back[0] + 1]} comes behind {times[back[0]]}; get the files anew")
    # The test begins so many days, of those that are there, before the end.
    test = times[max(0, len(times) - config.test_days * _A_DAY)] if config.test_days else times[-1] + _HALF_HOUR
    if test <= times[0]:
        raise UsageError(
            f"{config.path}: source.test_days {config.test_days} leaves nothing to train on: {len(times) // _A_DAY} "
            "days are there"
        )
    least, greatest = _range(recordings, test)
    starts = {"train": [], "test": []}  # (recording, first step) of sequences without gaps
    for recording in recordings:
        first, last = recording.times[: 1 - _FRAMES], recording.times[_FRAMES - 1 :]
        for step in np.flatnonzero(last - first == (_FRAMES - 1) * _HALF_HOUR):
            part = "test" if first[step] >= test else "train" if last[step] < test else None
            if part:
                starts[part].append((recording, int(step)))
    if not starts["train"]:
        raise UsageError(f"{config.path}: no {_FRAMES} half hours without a gap before {test}, when the test begins")
    order = np.searchsorted(times, [recording.times[step] for recording, step in starts["train"]])
    splits = splits_in_time(order.tolist(), _FRAMES, config.validation_fraction)
    placed = [(*place, split) for place, split in zip(starts["train"], splits, strict=True) if split]
    samples = []
    for recording, step, split in placed + [(*place, "test") for place in starts["test"]]:
        name = f"{recording.times[step]}"
        about = {"time": f"{name}:00", "interval_h": 0.5, "range": [least, greatest]}
        item = {"first": step}
        samples.append(SourceSample(make_key(name), split, None, name, about, recording.path, item, recording.size))
    return samples


def _recording(path: Path) -> _Recording:
    try:
        file = _opened(path)
        dates, shape = [text.decode() for text in file["date"][:]], file["data"].shape
        days = np.array([f"{text[:4]}-{text[4:6]}-{text[6:8]}" for text in dates], "datetime64[m]")
        halves = np.array([int(text[8:]) for text in dates])
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: no TaxiBJ file that can be read ({one_line(error)}); get it anew") from None
    if len(shape) != 4 or shape[1] != 2 or shape[0] != len(dates) or len(dates) < _FRAMES:
        raise UsageError(f"{path}: data is {shape} for {len(dates)} dates; (t, 2, 32, 32) was expected: get it anew")
    if halves.min() < 1 or halves.max() > _A_DAY:
        raise UsageError(f"{path}: has a half hour {halves.max()}; TaxiBJ's days have 1 to {_A_DAY}")
    return _Recording(path, days + (halves - 1) * _HALF_HOUR, 4 * _FRAMES * int(np.prod(shape[1:])))


def _range(recordings: list[_Recording], test: np.datetime64) -> tuple[float, float]:
    """The least and greatest number of trips before the test."""
    least, greatest = np.inf, 0.0
    for recording in recordings:
        if steps := int(np.searchsorted(recording.times, test)):
            flows = np.maximum(_opened(recording.path)["data"][:steps], 0)
            least, greatest = min(least, float(flows.min())), max(greatest, float(flows.max()))
    if not least < greatest:
        raise UsageError(f"{recordings[0].path}: all flows before {test} are {least:g}; get the files anew")
    return least, greatest


@lru_cache(maxsize=8)
def _opened(path: Path) -> "h5py.File":
    import h5py

    return h5py.File(path)
