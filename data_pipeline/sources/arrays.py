"""Arrays in .npy and .npz files → samples (t, h, w, c): videos in uint8, or physical fields in float32. Torch-free.

A sample is one entry along the axis n, a whole file where there is no such axis, or some steps of its time.
An .npy is mapped into memory, and so is the member of an .npz, unpacked once for all processes that write one share of
shards; but where a file is a sample, it is loaded. Nothing is ever unpickled.
"""

import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange

from data_pipeline.arrays import npy_bytes, read_npy_header
from data_pipeline.config import ArraysSource
from data_pipeline.decoders import one_line
from data_pipeline.disk import OPEN_FILES, no_room_said, renamed
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.cuts import as_index, splits_in_time
from data_pipeline.sources.source import SourceSample, Split, hold_out, make_key


class _File(NamedTuple):
    path: Path
    name: str
    shape: dict[str, int]  # by the name of the axis
    dtype: np.dtype


def walk(config: ArraysSource) -> list[SourceSample]:
    """The samples in the order of the files and, in a file, of n or of time. UsageError says which file is of another
    shape or type, and what is wrong with a range."""
    files = list(_files(config))
    for file in files:
        same = [file.shape[axis] == files[0].shape[axis] for axis in file.shape if axis not in "nt"]
        if file.dtype != files[0].dtype or not all(same):
            raise UsageError(
                f"{file.path}: {file.dtype} {file.shape}, {files[0].path}: {files[0].dtype} {files[0].shape}; "
                "the arrays of one set have one type, height, width and channels"
            )
    channels = files[0].shape.get("c", 1)
    if config.channels and len(config.channels) != channels:
        raise UsageError(f"{files[0].path}: {channels} channels; source.channels names {len(config.channels)}")
    if config.dtype == "uint8" and files[0].dtype != np.uint8:
        raise UsageError(f"{files[0].path}: {files[0].dtype}, which uint8 does not hold; leave out source.dtype")
    if config.ranges:
        found = {split: _range(config, files, split, *wanted) for split, wanted in config.ranges.items()}
        return [sample for in_split in found.values() for _, sample in in_split]
    found = _range(config, files, "train", 0, _count(config, files))
    if not config.frame_steps:
        return hold_out([sample for _, sample in found], config.validation_fraction)
    splits = splits_in_time([first for first, _ in found], config.span, config.validation_fraction)
    return [replace(sample, split=split) for (_, sample), split in zip(found, splits, strict=True) if split]


def describe(config: ArraysSource, samples: Sequence[SourceSample]) -> Description:
    """With the type that is stored, and the names and units of the channels."""
    return Description(
        kind="clips", dtype=samples[0].item["dtype"], channels=list(config.channels), units=list(config.units)
    )


def read(config: ArraysSource, sample: SourceSample, scratch: Path | None = None) -> tuple[str, bytes]:
    """An .npy (t, h, w, c) of the set's type. DecodeError where the file is damaged, or values are infinite or not a
    number; UserError where ``scratch`` has no room. ``scratch`` is as in ``kept_array``, or nothing is kept."""
    several = config.frame_steps or "n" in config.axes.split()
    try:
        if scratch and several:
            array = kept_array(sample.path, config.member, scratch)
        else:
            array = open_array(sample.path, config.member)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DecodeError(f"its array cannot be read: {one_line(error)}") from None
    axes, item = config.axes.split(), sample.item
    wanted = {"n": item["first"]}
    if config.frame_steps:
        wanted["t"] = as_index([item["first"] + step for step in config.frame_steps])
    part = np.asarray(array[tuple(wanted.get(axis, slice(None)) for axis in axes)])
    left = [axis for axis in axes if axis != "n"]
    frames = rearrange(part, f"{' '.join(left)} -> t h w {'c' if 'c' in left else '1'}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
        frames = np.ascontiguousarray(frames, dtype=item["dtype"])
    if not np.isfinite(frames).all():
        raise DecodeError("has values that are infinite or not a number")
    return "npy", npy_bytes(frames)


def _range(
    config: ArraysSource, files: Sequence[_File], split: Split, first: int, end: int
) -> list[tuple[int, SourceSample]]:
    """The samples in a range that counts on from one file to the next, and where in it each begins."""
    what = "steps" if config.frame_steps else "samples"
    if end > (count := _count(config, files)):
        raise UsageError(f"{config.path}: source.{split} ends at {end}, but there are {count} {what}")
    samples, before = [], 0
    span, pace = (config.span, config.pace) if config.frame_steps else (1, 1)
    for file in files:
        length = _length(config, file)
        start, stop = max(first - before, 0), min(end - before, length)
        shape = {"c": 1, **file.shape} | ({"t": len(config.frame_steps)} if config.frame_steps else {})
        size = int(np.prod([shape[axis] for axis in "thwc"]))
        dtype = _dtype(config, file.dtype)
        for index in range(start, stop - span + 1, pace):
            name = f"{file.name}/{index:06d}" if length > 1 else file.name
            item = {"first": index, "dtype": dtype}
            about = {"steps": [index, index + span]} if config.frame_steps else {}
            about |= {"offsets": list(config.offsets)} if config.offsets else {}
            taken = size * np.dtype(dtype).itemsize
            sample = SourceSample(make_key(name), split, None, name, about, file.path, item, taken)
            samples.append((before + index, sample))
        before += length
    if not samples:
        how = "source.sequence asks for" if config.sequence else "source.offsets span"
        why = f"; {how} {config.span} steps in one file" if config.frame_steps else ""
        raise UsageError(f"{config.path}: no sample in {what} {first} to {end}{why}")
    return samples


def _count(config: ArraysSource, files: Sequence[_File]) -> int:
    return sum(_length(config, file) for file in files)


def _length(config: ArraysSource, file: _File) -> int:
    return file.shape["t"] if config.frame_steps else file.shape.get("n", 1)


def _dtype(config: ArraysSource, found: np.dtype) -> str:
    return config.dtype or ("uint8" if found == np.uint8 else "float32")


def _files(config: ArraysSource) -> Iterator[_File]:
    root = config.path
    if root.is_dir():
        top, paths = root, [path for kind in ("npy", "npz") for path in root.rglob(f"*.{kind}")]
    else:
        top = next(parent for parent in root.parents if not has_magic(str(parent)))
        paths = list(top.glob(root.relative_to(top).as_posix()))
    paths = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UsageError(f"{root}: no .npy or .npz there; source.path must name one, a folder of them or a pattern")
    axes = config.axes.split()
    for path in paths:
        shape, dtype = array_header(path, config.member)
        if len(shape) != len(axes):
            raise UsageError(f"{path}: has {len(shape)} axes {shape}; source.axes names {len(axes)}: {config.axes}")
        if dtype.kind not in "buif":
            raise UsageError(f"{path}: holds {dtype}, not numbers (nothing is unpickled); give an array of numbers")
        yield _File(path, path.relative_to(top).as_posix(), dict(zip(axes, shape, strict=True)), dtype)


def array_header(path: Path, member: str | None) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, of which only the first bytes are read. UsageError if there is none."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive, archive.open(_member(path, archive, member)) as file:
                shape, _, dtype = read_npy_header(file)
        else:
            with path.open("rb") as file:
                shape, _, dtype = read_npy_header(file)
        return shape, dtype
    except (DecodeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: no array that can be read ({error}); make it anew with numpy.save") from None


def _member(path: Path, archive: zipfile.ZipFile, member: str | None) -> str:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if member is None and len(names) == 1:
        return f"{names[0]}.npy"
    if member not in names:
        raise UsageError(f"{path}: holds {', '.join(names)}; source.member must name one of them")
    return f"{member}.npy"


def open_array(path: Path, member: str | None) -> np.ndarray:
    """An array: of an .npy the file itself, as memory; of an .npz a copy."""
    if path.suffix != ".npz":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with zipfile.ZipFile(path) as archive, archive.open(_member(path, archive, member)) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@lru_cache(maxsize=OPEN_FILES)
def kept_array(path: Path, member: str | None, scratch: Path) -> np.ndarray:
    """An array as memory, kept open: an .npz is unpacked into the folder ``scratch`` by the first process that asks for
    it, others that ask meanwhile wait. UserError where there is no room."""
    if path.suffix == ".npz":
        path, member = _unpacked(path, member, scratch), None
    return open_array(path, member)


def _unpacked(path: Path, member: str | None, scratch: Path) -> Path:
    from filelock import FileLock

    unpacked = scratch / f"{make_key(f'{path}/{member}')}.npy"
    with no_room_said(scratch):
        scratch.mkdir(exist_ok=True)
        with FileLock(unpacked.with_suffix(".lock")):
            if not unpacked.exists():
                with zipfile.ZipFile(path) as archive, renamed(unpacked) as temporary, temporary.open("wb") as file:
                    shutil.copyfileobj(archive.open(_member(path, archive, member)), file, 2**20)
    return unpacked
