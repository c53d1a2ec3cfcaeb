"""Climatology: what is usual at a grid point, from the training split, streamed sample by sample.

A yardstick for forecasts of fields, and what anomalies are differences from. It is the mean over the training split of
each grid point by hour of the day; where the split spans more than a year, by hour and day of the year, over a window
of 31 days around the day, as a few years give too few values of a day alone; and of all hours where the data name no
times. Times are UTC where they bear a zone, and taken as they are where not.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from data_pipeline import key_json
from data_pipeline.arrays import load_array
from data_pipeline.config import Location
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.order import FileOrder
from data_pipeline.shard_set import ShardSet, read_set
from data_pipeline.windows import Raw, WindowReader
from stpredict.evaluation.forecasts import ForecastIndex

log = logging.getLogger(__name__)
DAYS = 366  # of a year with a 29th of February
WINDOW = 31  # days around a day of the year, itself included
_EPOCH = datetime(1970, 1, 1)
Slot = tuple[int, int]  # minute of the day, day of the year: 0, 0 where there are no times


@dataclass
class _Mean:
    """Of arrays ``(h, w, c)``."""

    total: np.ndarray | float = 0.0
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        self.total = self.total + values
        self.count += 1


@dataclass
class Climatology:
    """``kind`` says in words what it is a mean of."""

    where: str
    channels: list[str]
    means: dict[Slot, _Mean]
    timed: bool
    daily: bool
    frames: int
    units: list[str] = field(default_factory=list)
    latitudes: list[float] | None = None
    _cache: dict[Slot, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        by = " by hour of day" if self.timed else ""
        if self.daily:
            by = f" by hour and day of year, {WINDOW} days around it"
        return f"mean of each grid point{by}, over {self.frames:,} frames of {self.where}"

    def check(self, shape: tuple[int, ...], index: ForecastIndex) -> None:
        """UsageError where forecasts of frames ``shape`` ``(h, w, c)`` are not of this grid, or are of other channels,
        units or latitudes, where both are known."""
        own = next(iter(self.means.values())).total.shape
        if own != shape:
            raise UsageError(f"climatology: {self.where} has frames (h, w, c) of {own}, the forecasts of {shape}")
        if self.channels and self.channels != index.channels:
            raise UsageError(
                f"climatology: {self.where} has the channels {', '.join(self.channels)}, the forecasts "
                f"{', '.join(index.channels)}"
            )
        if all(self.units) and all(index.units) and self.units and self.units != index.units:
            raise UsageError(
                f"climatology: {self.where} is in {', '.join(self.units)}, the forecasts in {', '.join(index.units)}"
            )
        if self.latitudes and index.latitudes and not np.allclose(self.latitudes, index.latitudes, atol=1e-4):
            raise UsageError(f"climatology: {self.where} has rows at other latitudes than the forecasts")
        if self.timed and index.valid_times(0) is None:
            raise UsageError(
                "climatology: by the hour of the day, but the forecasts name no times; make them again from shards "
                "that do, or leave it out"
            )

    def of(self, times: list[datetime] | None, frames: int) -> np.ndarray:
        """What is usual at ``times``, float64 ``(t, h, w, c)``; the same throughout where nothing is known of times."""
        if not self.timed:
            return np.broadcast_to(self._at((0, 0)), (frames, *self._at((0, 0)).shape))
        return np.stack([self._at(_slot(time, self.daily)) for time in times])

    def _at(self, slot: Slot) -> np.ndarray:
        if slot not in self._cache:
            self._cache[slot] = self._around(slot)
        return self._cache[slot]

    def _around(self, slot: Slot) -> np.ndarray:
        minute, day = slot
        reach = WINDOW // 2 if self.daily else 0
        near = [self.means.get((minute, (day + step) % DAYS)) for step in range(-reach, reach + 1)]
        near = [mean for mean in near if mean is not None]
        if not near:
            when = f"{minute // 60:02}:{minute % 60:02}"
            on = f" within {reach} days of day {day + 1} of the year" if self.daily else ""
            raise UsageError(f"climatology: {self.where} holds nothing of {when}{on}, which the forecasts are of")
        return sum(mean.total for mean in near) / sum(mean.count for mean in near)


def read_climatology(
    shards: Location,
    report: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Climatology], None] = lambda begun: None,
) -> Climatology:
    """From the split ``train`` of the shard set at ``shards``; calls ``report(samples done, samples)``, and ``check``
    with what is known from the first sample on: it may raise before all are read.

    UsageError where there is none, or it holds no fields; UserError where no sample of a shard can be read.
    """
    opened = read_set(shards, "train")
    if opened.manifest.kind != "clips" or opened.manifest.dtype != "float32":
        raise UsageError(f"climatology: {opened.where} holds no fields (float32), but {opened.manifest.dtype}")
    manifest = opened.manifest
    about = {"units": list(manifest.units), "latitudes": manifest.latitudes}
    means: dict[Slot, _Mean] = {}
    timed, frames, unreadable = None, 0, 0
    first = last = None
    for sample in _samples(opened, report):
        if sample is None:
            unreadable += 1
            continue
        times = sample["times"]
        if timed is None:
            timed = times is not None
        if timed != (times is not None):
            raise UsageError(
                f"climatology: {opened.where}: some samples name their time, others do not; shard it again"
            )
        for number, values in enumerate(sample["array"]):
            slot = _slot(times[number], daily=True) if timed else (0, 0)
            means.setdefault(slot, _Mean()).add(values.astype(np.float64))
            frames += 1
        if frames == len(sample["array"]):
            check(Climatology(opened.where, list(manifest.channels), means, timed, False, frames, **about))
        if timed:
            first, last = min(first or times[0], times[0]), max(last or times[-1], times[-1])
    if unreadable:
        log.warning("%d samples of %s could not be read and are no part of the climatology", unreadable, opened.where)
    daily = bool(timed) and last - first > timedelta(days=DAYS)
    if timed and not daily:
        means = _over_days(means)
    return Climatology(opened.where, list(manifest.channels), means, bool(timed), daily, frames, **about)


def _over_days(means: dict[Slot, _Mean]) -> dict[Slot, _Mean]:
    joined: dict[Slot, _Mean] = {}
    for (minute, _), mean in means.items():
        whole = joined.setdefault((minute, 0), _Mean())
        whole.total = whole.total + mean.total
        whole.count += mean.count
    return joined


def _slot(time: datetime, daily: bool) -> Slot:
    if time.tzinfo is not None:
        time = time.astimezone(UTC)
    day = datetime(2000, time.month, time.day).timetuple().tm_yday - 1 if daily else 0  # 2000 has all days
    return time.hour * 60 + time.minute, day


class _Fields:
    """KEY.npy and KEY.json → the whole array of a sample and the times of its frames."""

    per_count = 1
    array_bytes = 0

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        return [{"key": members["__key__"], "members": members}]

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        members = raw["members"]
        if "npy" not in members or "json" not in members:
            raise DecodeError("its .npy or its .json is missing")
        array = load_array(members["npy"])
        return {"array": array, "times": _times(key_json.parse(members["json"]), len(array))}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def _times(about: dict[str, Any], frames: int) -> list[datetime] | None:
    """Of every frame, in UTC; None where nothing is known of them."""
    if "time" not in about:
        return None
    return [_EPOCH + timedelta(minutes=minute) for minute in key_json.minutes(about, frames)]


@contextmanager
def _nowhere(_what: str, sample: bool = True) -> Iterator[None]:
    yield


def _samples(opened: ShardSet, report: Callable[[int, int], None]) -> Iterator[dict[str, Any] | None]:
    """Each once, in the order of the files; None for one that cannot be read."""
    reader = WindowReader(opened, _Fields(), _nowhere, quarantined=())
    order = FileOrder([shard.window_samples for shard in opened.manifest.shards])
    for number in range(order.samples):
        reading = reader.read(order.slot(number, 0))
        yield None if reading.unreadable else reading.sample
        report(number + 1, order.samples)
