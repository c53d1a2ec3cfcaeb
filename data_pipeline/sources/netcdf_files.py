"""One netCDF file: its fields by name as (time, latitude, longitude), wherever and whatever its axes are.

netCDF 4 is read through h5netcdf, netCDF 3 through SciPy; both by xarray, which scales packed numbers, makes missing
ones NaN and reads no more of a field than is asked for. Torch-free.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.config import AxisNames, NetcdfSource
from data_pipeline.decoders import one_line
from data_pipeline.disk import OPEN_FILES
from data_pipeline.errors import DecodeError, UsageError

if TYPE_CHECKING:
    import xarray as xr

_ENGINES = {b"CDF\x01": "scipy", b"CDF\x02": "scipy", b"\x89HDF": "h5netcdf"}  # by how files begin

_NAMES = {
    "time": {"time", "valid_time", "t", "date"},
    "level": {"level", "lev", "plev", "pressure", "pressure_level", "isobaricinhpa", "height", "depth"},
    "latitude": {"latitude", "lat", "y", "nav_lat"},
    "longitude": {"longitude", "lon", "x", "nav_lon"},
}
_CF_AXES = {"time": "T", "level": "Z", "latitude": "Y", "longitude": "X"}
_CALENDARS = (
    "times must count days or hours since a date of the standard calendar (xarray's convert_calendar makes such of "
    "others; dates before 1678 need the package cftime)"
)
_DEGREES_NORTH = {"degrees_north", "degree_north", "degrees_n", "degree_n", "degreen", "degreesn"}


def open_file(path: Path) -> "xr.Dataset":
    """An open file, of which nothing but the axes is read. DecodeError if it is no netCDF or damaged, UsageError if its
    times are no dates that can be read."""
    import xarray as xr

    with reading():
        with path.open("rb") as file:
            engine = _ENGINES.get(file.read(4))
        if engine is None:
            raise DecodeError("is no netCDF file of version 3 or 4")
        try:
            return xr.open_dataset(path, engine=engine, decode_timedelta=False)
        except ValueError as error:
            if "decode time units" not in str(error):
                raise
            raise UsageError(f"{path}: {one_line(error).partition('. Try')[0]}; {_CALENDARS}") from None


@lru_cache(maxsize=OPEN_FILES)
def kept_open(path: Path) -> "xr.Dataset":
    """Like ``open_file``, but left open: samples come shuffled, and opening one takes longer than reading a window."""
    import xarray as xr

    xr.set_options(file_cache_maxsize=OPEN_FILES)  # xarray closes files by itself, beyond 128
    return open_file(path)


@contextmanager
def reading() -> Iterator[None]:
    """What xarray and the libraries under it raise becomes a DecodeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of fill values that have another type than their numbers
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DecodeError(f"cannot be read: {one_line(error)}") from None


class Field:
    """One variable of an open file, as ``config`` names it and its axes. UsageError where these do not fit the file."""

    def __init__(self, config: NetcdfSource, path: Path, dataset: "xr.Dataset", variable: str):
        self.path, self.variable, array = path, variable, dataset[variable]
        names = {axis: _find(config.axes, axis, array, path) for axis in _NAMES}
        for axis in ("time", "latitude", "longitude"):
            if names[axis] is None:
                raise UsageError(
                    f"{path}: which axis of {variable} ({', '.join(map(str, array.dims))}) is its {axis}? "
                    f"source.axes.{axis} names it"
                )
        self.units = config.units.get(variable, str(array.attrs.get("units", "")))
        level = names["level"]
        self.levels = _levels(config, path, array, level) if level else []
        for name, size in array.sizes.items():
            if name not in names.values() and size > 1:
                raise UsageError(
                    f"{path}: {variable} has an axis {name} of {size}; fields have time, level, "
                    "latitude and longitude: write a file with one of its entries"
                )
        array = array.isel({name: 0 for name in array.dims if name not in names.values()})
        if level:
            found = [_position(array, level, value) for value in self.levels]
            array = array.isel({level: found}) if found else array.isel({level: 0})
        order = [names["time"], *([level] if self.levels else []), names["latitude"], names["longitude"]]
        self._array, self._time = array.transpose(*order), names["time"]
        self.steps, self.height, self.width = (array.sizes[names[a]] for a in ("time", "latitude", "longitude"))
        self.latitudes = _latitudes(array, names["latitude"])
        self.longitudes = _numbers(array, names["longitude"])

    @property
    def channels(self) -> list[str]:
        return [f"{self.variable}_{value:g}" for value in self.levels] or [self.variable]

    @property
    def times(self) -> np.ndarray | None:
        """datetime64[ns] (steps,); None of files that have no dates. UsageError where a date is missing, or they are of
        another calendar."""
        if self._time not in self._array.coords:
            return None
        times = self._array[self._time].values
        if times.dtype.kind == "O":  # as xarray gives them where cftime is installed
            raise UsageError(f"{self.path}: its {self._time} is of another calendar; {_CALENDARS}")
        if times.dtype.kind == "M" and np.isnat(times).any():
            raise UsageError(f"{self.path}: step {np.isnat(times).argmax()} has no {self._time}; leave the file out")
        return times.astype("datetime64[ns]") if times.dtype.kind == "M" else None

    def values(self, steps: slice | list[int]) -> np.ndarray:
        """The field at ``steps``: floats (t, h, w, channels), NaN where they are missing. DecodeError if that part of
        the file is damaged."""
        with reading():
            values = self._array.isel({self._time: steps}).values
        if values.dtype.kind not in "buif":
            raise DecodeError(f"{self.variable} holds {values.dtype}, not numbers")
        return np.moveaxis(values, 1, -1) if self.levels else values[..., None]


def _find(given: AxisNames, axis: str, array: "xr.DataArray", path: Path) -> str | None:
    """The name of an axis: as given, as is usual, or as the CF conventions mark it."""
    if name := getattr(given, axis):
        if name not in array.dims and axis != "level":  # variables without levels may stand beside those with
            raise UsageError(f"{path}: {array.name} has no axis {name}, but {', '.join(map(str, array.dims))}")
        return name if name in array.dims else None
    usual = [name for name in array.dims if str(name).lower() in _NAMES[axis]]
    marked = [name for name in array.dims if name in array.coords and _is(axis, array.coords[name])]
    return next(iter(usual + marked), None)


def _is(axis: str, coordinate: "xr.DataArray") -> bool:
    about = coordinate.attrs
    return about.get("axis") == _CF_AXES[axis] or about.get("standard_name") == axis


def _levels(config: NetcdfSource, path: Path, array: "xr.DataArray", level: str) -> list[float]:
    there = array[level].values
    if not config.levels:
        if len(there) > 1:
            raise UsageError(
                f"{path}: {array.name} has the levels {', '.join(f'{value:g}' for value in there)}: "
                "source.levels says which are wanted"
            )
        return []
    for value in config.levels:
        if not np.isclose(there.astype(float), value).any():
            raise UsageError(f"{path}: {array.name} has no level {value:g}, but {', '.join(f'{v:g}' for v in there)}")
    return list(config.levels)


def _position(array: "xr.DataArray", level: str, value: float) -> int:
    return int(np.abs(array[level].values.astype(float) - value).argmin())


def _latitudes(array: "xr.DataArray", name: str) -> list[float] | None:
    """In degrees north; None where the axis is something else, such as kilometres."""
    if name not in array.coords:
        return None
    coordinate = array.coords[name]
    is_called = str(name).lower() in {"latitude", "lat"} or coordinate.attrs.get("standard_name") == "latitude"
    is_measured = str(coordinate.attrs.get("units", "")).lower() in _DEGREES_NORTH
    return _numbers(array, name) if is_called or is_measured else None


def _numbers(array: "xr.DataArray", name: str) -> list[float] | None:
    """Where the points of an axis are; None where the file does not say."""
    return array.coords[name].values.astype(float).tolist() if name in array.coords else None
