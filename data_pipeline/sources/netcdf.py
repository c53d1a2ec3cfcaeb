"""Fields in netCDF files → samples (t, h, w, c) in float32, cut along time. Torch-free.

    path/t2m.nc                          time, latitude, longitude; all variables in one file, or in several
    path/2m_temperature/*_2010_*.nc      WeatherBench: a folder per variable, a file per year

A variable's files are put in the order of their times. Where variables have different times, those that all have are
taken. A sample never reaches over a gap in the times, nor into another split.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from glob import has_magic
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from data_pipeline.arrays import npy_bytes
from data_pipeline.config import NetcdfSource, Split
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.cuts import as_index, splits_in_time
from data_pipeline.sources.netcdf_files import Field, kept_open, open_file
from data_pipeline.sources.source import SourceSample, make_key

log = logging.getLogger(__name__)

_ENDINGS = {".nc", ".nc3", ".nc4", ".cdf", ".netcdf"}
_HOUR = np.timedelta64(1, "h")
_UNWRITTEN = 9.9692e36, 9.9693e36  # around what netCDF's library puts where nothing was written, _FillValue or not


@dataclass(frozen=True)
class _Part:
    """What one file has of one variable."""

    file: str  # in the folder that source.path names
    times: np.ndarray | None  # datetime64[ns]
    steps: int
    grid: tuple[int, int]  # height, width
    places: tuple[list[float] | None, list[float] | None]  # of the rows and of the columns, where the file says so
    levels: tuple[float, ...]
    units: str


@dataclass(frozen=True)
class _Line:
    """A variable's steps from its first file to its last; ``file[i]`` and ``index[i]`` say where step i stands."""

    files: list[str]
    file: np.ndarray
    index: np.ndarray
    times: np.ndarray | None

    def pieces(self, steps: np.ndarray) -> list[list[Any]]:
        """The steps in runs of one file each: [file, [index, …]]."""
        file, index = self.file[steps], self.index[steps]
        runs = np.split(index, np.flatnonzero(np.diff(file)) + 1) if file[0] != file[-1] else [index]
        return [[self.files[at], run.tolist()] for at, run in zip(dict.fromkeys(file.tolist()), runs, strict=True)]


def walk(config: NetcdfSource) -> list[SourceSample]:
    """The samples of each split in the order of time. UsageError says which file does not fit the config or the other
    files, and in which range of times there is nothing."""
    top, parts = _parts(config)
    lines = {variable: _line(config, variable, found) for variable, found in parts.items()}
    times, steps = _common(config, lines)
    height, width = parts[config.variables[0]][0].grid
    channels = sum(len(found[0].levels) or 1 for found in parts.values())
    frames = np.array(config.frame_steps)
    size = 4 * len(frames) * height * width * channels
    starts = _starts(config, times, len(steps[config.variables[0]]))
    clock, samples = _clock(times, frames), []
    paths = {part.file: top / part.file for found in parts.values() for part in found}
    for split, start in starts:
        taken = start + frames
        pieces = {variable: line.pieces(steps[variable][taken]) for variable, line in lines.items()}
        about = clock(start)
        name = about.get("time", f"{start:06d}")
        about |= {"offsets": list(config.offsets)} if config.offsets else {}
        first, *others = dict.fromkeys(paths[file] for of_variable in pieces.values() for file, _ in of_variable)
        samples.append(SourceSample(make_key(name), split, None, name, about, first, pieces, size, tuple(others)))
    _refuse_missing(config, samples[0])
    return samples


def describe(config: NetcdfSource, samples: Sequence[SourceSample]) -> Description:
    """With the names and units of the channels, and the latitudes of the rows where the files have such."""
    fields = [_field(config, variable, pieces[0][0]) for variable, pieces in samples[0].item.items()]
    return Description(
        kind="clips",
        dtype="float32",
        channels=[channel for field in fields for channel in field.channels],
        units=[field.units for field in fields for _ in field.channels],
        latitudes=fields[0].latitudes,
    )


def read(config: NetcdfSource, sample: SourceSample) -> tuple[str, bytes]:
    """An .npy float32 (t, h, w, c). DecodeError where a file is damaged, or values are missing, infinite or beyond
    float32."""
    channels = []
    for variable, pieces in sample.item.items():
        parts = [_present(config, _field(config, variable, name), steps) for name, steps in pieces]
        channels.append(np.concatenate(parts))
    return "npy", npy_bytes(np.concatenate(channels, axis=-1))


def _field(config: NetcdfSource, variable: str, file: str) -> Field:
    path = _top(config.path) / file
    return Field(config, path, kept_open(path), variable)


def _present(config: NetcdfSource, field: Field, steps: Sequence[int]) -> np.ndarray:
    """The field at ``steps`` in float32, (t, h, w, channels), with what is missing filled in. DecodeError where that
    was not asked for."""
    values = field.values(as_index(steps))
    missing = np.isnan(values) | ((values > _UNWRITTEN[0]) & (values < _UNWRITTEN[1]))
    if missing.any():
        if config.fill is None:
            frame = int(missing.any(axis=(1, 2, 3)).argmax())
            when = f"step {steps[frame]}" if field.times is None else _text(field.times[steps[frame]])
            raise DecodeError(
                f"{field.variable} has {missing[frame].sum()} missing values at {when}; source.fill puts a value there"
            )
        values = np.where(missing, config.fill, values)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise DecodeError(f"{field.variable} has values that are infinite or beyond float32")
    return values


def _refuse_missing(config: NetcdfSource, sample: SourceSample) -> None:
    """UsageError where the very first frame has missing values: a field without land, or without sea, has them in
    every frame."""
    first = {variable: [[file, steps[:1]] for file, steps in pieces[:1]] for variable, pieces in sample.item.items()}
    try:
        read(config, replace(sample, item=first))
    except DecodeError as error:
        raise UsageError(f"{sample.path}: {error}") from None


def _top(path: Path) -> Path:
    """The folder that the names of files are in."""
    if path.is_dir():
        return path
    return next(parent for parent in path.parents if not has_magic(str(parent)) and "{" not in str(parent))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = {file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS}
    else:
        top = _top(path)
        found = {file for pattern in braceexpand(path.relative_to(top).as_posix()) for file in top.glob(pattern)}
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UsageError(
            f"{path}: no netCDF file (.nc) there; source.path must name one, a folder of them or a pattern"
        )
    return files


def _parts(config: NetcdfSource) -> tuple[Path, dict[str, list[_Part]]]:
    """The folder that names of files are in, and what each file has of each variable."""
    top, seen = _top(config.path), set()
    parts: dict[str, list[_Part]] = {variable: [] for variable in config.variables}
    for path in _files(config.path):
        try:
            with open_file(path) as dataset:
                seen |= set(map(str, dataset.data_vars))
                for variable in parts.keys() & seen & set(dataset.data_vars):
                    field = Field(config, path, dataset, variable)
                    if not field.steps:
                        raise UsageError(f"{path}: {variable} has no steps in it; leave the file out of source.path")
                    grid, places = (field.height, field.width), (field.latitudes, field.longitudes)
                    about = field.times, field.steps, grid, places, tuple(field.levels), field.units
                    parts[variable].append(_Part(path.relative_to(top).as_posix(), *about))
        except DecodeError as error:
            raise UsageError(f"{path}: {error}; get it anew, or leave it out of source.path") from None
    if missing := [variable for variable, found in parts.items() if not found]:
        names = ", ".join(sorted(seen)[:20])
        raise UsageError(f"{config.path}: no variable {missing[0]} there; source.variables can be of {names}")
    every = [part for found in parts.values() for part in found]
    if config.levels and not any(part.levels for part in every):
        raise UsageError(f"{config.path}: no variable has levels; leave out source.levels")
    for part in every:
        if part.grid != every[0].grid or not all(map(_alike, part.places, every[0].places)):
            raise UsageError(
                f"{top / part.file}: its grid of {part.grid[0]}x{part.grid[1]} is not that of {top / every[0].file}, "
                f"{every[0].grid[0]}x{every[0].grid[1]}, or has other latitudes or longitudes; the fields of one "
                "set have one grid"
            )
    for variable, found in parts.items():
        if other := next((part for part in found if (part.levels, part.units) != (found[0].levels, found[0].units)), 0):
            raise UsageError(
                f"{top / other.file}: {variable} is in '{other.units}', in {top / found[0].file} in "
                f"'{found[0].units}', or has other axes; source.units says what holds for all files"
            )
    return top, parts


def _alike(one: list[float] | None, other: list[float] | None) -> bool:
    """Whether these are the same places, of which one file may have fewer digits than another."""
    if one is None or other is None:
        return one is other
    return np.allclose(one, other, rtol=0, atol=1e-4)


def _line(config: NetcdfSource, variable: str, parts: list[_Part]) -> _Line:
    """One file after another, in the order of their times. UsageError where times come twice or go back."""
    dated = [part.times is not None for part in parts]
    if any(dated) and not all(dated):
        raise UsageError(
            f"{config.path}: {variable} has times in some files and none in {parts[dated.index(False)].file}"
        )
    if all(dated):
        parts = sorted(parts, key=lambda part: part.times[0])
    files = [part.file for part in parts]
    file = np.repeat(np.arange(len(parts)), [part.steps for part in parts])
    index = np.concatenate([np.arange(part.steps) for part in parts])
    if not all(dated):
        return _Line(files, file, index, None)
    times = np.concatenate([part.times for part in parts])
    back = np.flatnonzero(np.diff(times) <= np.timedelta64(0))
    if len(back):
        step = back[0] + 1
        raise UsageError(
            f"{config.path}: {variable} has {_text(times[step])} ({files[file[step]]}) behind {_text(times[step - 1])} "
            f"({files[file[step - 1]]}); times must ascend and come once: choose the files by a pattern"
        )
    return _Line(files, file, index, times)


def _common(config: NetcdfSource, lines: dict[str, _Line]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """The times that all variables have, and which step of each variable they are."""
    lengths = {variable: len(line.index) for variable, line in lines.items()}
    undated = [variable for variable, line in lines.items() if line.times is None]
    if undated:
        if len(undated) < len(lines):
            raise UsageError(f"{config.path}: {undated[0]} has no times, other variables have; leave it out")
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{variable}: {length}" for variable, length in lengths.items())
            raise UsageError(f"{config.path}: variables without dates have different numbers of steps ({told})")
        return None, {variable: np.arange(length) for variable, length in lengths.items()}
    times = reduce(np.intersect1d, (line.times for line in lines.values()))
    if not len(times):
        raise UsageError(f"{config.path}: no time at which all of {', '.join(lines)} are there")
    if len(times) < max(lengths.values()):
        log.warning(
            "%s: %d times that not all variables have are left out", config.path, max(lengths.values()) - len(times)
        )
    return times, {variable: np.searchsorted(line.times, times) for variable, line in lines.items()}


def _starts(config: NetcdfSource, times: np.ndarray | None, steps: int) -> list[tuple[Split, int]]:
    """The split and first step of every sample. UsageError where a split has none."""
    passed = np.zeros(steps, int) if times is None else _gaps_before(times)

    def whole(first: int, end: int) -> list[int]:
        starts = np.arange(first, end - config.span + 1, config.pace)
        kept = starts[passed[starts + config.span - 1] == passed[starts]]
        if len(kept) < len(starts):
            log.warning(
                "%s: %d samples that reach over gaps in time are left out", config.path, len(starts) - len(kept)
            )
        return kept.tolist()

    if not config.ranges:
        starts = whole(0, steps)
        if not starts:
            raise UsageError(f"{config.path}: {steps} steps{_without_gaps(passed)}; a sample spans {config.span}")
        splits = splits_in_time(starts, config.span, config.validation_fraction, config.test_fraction)
        return [(split, start) for split, start in zip(splits, starts, strict=True) if split]
    if times is None:
        raise UsageError(
            f"{config.path}: has no dates to find source.{next(iter(config.ranges))} by; use "
            "source.validation_fraction and source.test_fraction"
        )
    found = []
    for split, (first, end) in _periods(config).items():
        low, high = np.searchsorted(times, [first, end])
        if not (starts := whole(low, high)):
            raise UsageError(
                f"{config.path}: source.{split} {list(getattr(config, split))} has {high - low} steps"
                f"{_without_gaps(passed[low:high])}; a sample spans {config.span}, and the files have "
                f"{_text(times[0])} to {_text(times[-1])}"
            )
        found += [(split, start) for start in starts]
    return found


def _periods(config: NetcdfSource) -> dict[Split, tuple[np.datetime64, np.datetime64]]:
    """Of each range the first instant, and the first behind it: 2015 ends with its last hour. UsageError where ranges
    overlap or are no dates."""
    periods: dict[Split, tuple[np.datetime64, np.datetime64]] = {}
    for split, given in config.ranges.items():
        try:
            first, last = (np.datetime64(text) for text in given)
        except ValueError as error:
            raise UsageError(f"source.{split} {list(given)}: {error}") from None
        periods[split] = first, last + 1  # a year, month, day, hour or minute later: in the unit it is written in
        if first >= last + 1:
            raise UsageError(f"source.{split} {list(given)} ends before it begins")
    for (one, (first, end)), (other, (other_first, other_end)) in combinations(periods.items(), 2):
        if first < other_end and other_first < end:
            raise UsageError(
                f"source.{one} {list(config.ranges[one])} and {other} {list(config.ranges[other])} overlap"
            )
    return periods


def _gaps_before(times: np.ndarray) -> np.ndarray:
    """How many gaps there are before each time: where the next one is more than one and a half times as far as is
    usual. Months are no gaps."""
    apart = np.diff(times)
    wide = apart > 1.5 * np.median(apart) if len(apart) else []
    return np.concatenate([[0], np.cumsum(wide)]).astype(int)


def _without_gaps(passed: np.ndarray) -> str:
    gaps = int(passed[-1] - passed[0]) if len(passed) else 0
    return f", with {gaps} gaps" if gaps else ""


def _clock(times: np.ndarray | None, frames: np.ndarray) -> Callable[[int], dict[str, Any]]:
    """What KEY.json says of the sample that starts at a step: the time of its first frame, and the hours from each
    frame to the next, or, where they differ, of every frame from the first."""
    if times is None:
        return lambda start: {}
    texts = np.datetime_as_string(times, unit="s")

    def apart(start: int) -> dict[str, Any]:
        taken = times[start + frames]
        hours = (taken - taken[0]) / _HOUR
        between = set(np.diff(hours).tolist())
        return {"interval_h": between.pop()} if len(between) == 1 else {"hours": hours.tolist()} if between else {}

    even = apart(0) if len(set(np.diff(times).tolist())) == 1 else None  # of all samples
    return lambda start: {"time": str(texts[start]), **(apart(start) if even is None else even)}


def _text(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="s"))
