"""Reads samples of a shard set by their slot, one window of one tar at a time.

A window is read with one request and kept, still encoded, until its stream moves on. A sample that cannot be read is
replaced by the next one of its window that can, or failing that of its shard: positions never move.
"""

import io
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipeline.config import CacheConfig
from data_pipeline.errors import DecodeError, UserError
from data_pipeline.order import Slot
from data_pipeline.shard_cache import ShardFiles
from data_pipeline.shard_set import ShardSet
from data_pipeline.workers import At

LONGEST_KEY = 255  # characters
Raw = dict[str, Any]  # a sample as the tar has it


class Format(Protocol):
    """What the members of a tar mean."""

    #: Samples that each of the set's counts stands for.
    per_count: int
    #: Bytes of the array of a sample.
    array_bytes: int

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        """WebDataset's dictionary of one key → what is counted in it; each has at least ``key``."""

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        """Sample number ``part`` of ``per_count``, ready to be stacked. Raises DecodeError if it is unreadable."""

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as training sees it, from the stacked samples."""


@dataclass
class Reading:
    """A sample, and, where the slot's own is unreadable, its key → reason. The sample is then the next one that is
    not; others met on the way are named in their own turn."""

    sample: dict[str, Any]
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass
class _Window:
    """What a window holds: as many entries as the manifest says, None where a damaged tar has no more to give."""

    where: tuple[int, int]
    samples: list[Raw | None]
    damage: str


class WindowReader:
    """``read`` gives the sample at a slot. ``stream`` says on whose behalf: each keeps its current window.

    ``quarantined`` samples are not touched; ``at`` says aloud what is being read (see ``workers``).
    """

    def __init__(
        self, shards: ShardSet, format: Format, at: At, quarantined: Collection[str], cache: CacheConfig | None = None
    ):
        self._shards, self._format, self._at, self._quarantined = shards.manifest.shards, format, at, quarantined
        self._files = ShardFiles(shards.folders, self._shards, cache)
        self._current: dict[int, _Window] = {}

    def read(self, slot: Slot, stream: int = 0) -> Reading:
        """The sample at ``slot`` or what replaces it. UserError if nothing in the shard is readable."""
        unreadable: dict[str, str] = {}
        for number, position in self._candidates(slot):
            count, part = divmod(position, self._format.per_count)
            window = self._window(slot.shard, number, stream)
            raw = window.samples[count]
            name = str(raw["key"]) if raw else f"{self._files.name(slot.shard)}, window {number}, sample {count}"
            try:
                if raw is None:
                    raise DecodeError(f"missing in the tar ({window.damage}): `stpredict inspect --verify` tells more")
                if reason := _refusal(name):
                    raise DecodeError(reason)
                if name in self._quarantined:
                    raise DecodeError("quarantined: it has stopped a worker before")
                with self._at(name):
                    return Reading(self._format.sample(raw, slot.epoch, part), unreadable)
            except DecodeError as error:
                shown = name.encode(errors="backslashreplace").decode()[:LONGEST_KEY]  # a log takes no surrogates
                unreadable = unreadable or {shown: str(error)[:300]}  # short: it goes through a pipe
                reason = error
        raise UserError(f"{self._files.name(slot.shard)}: no sample can be read; {name}: {reason}")

    def _candidates(self, slot: Slot) -> Iterator[tuple[int, int]]:
        """The slot's own window from its position on, round; then the other windows of the shard."""
        counts = self._shards[slot.shard].window_samples
        for step in range(len(counts)):
            window = (slot.window + step) % len(counts)
            start, samples = slot.position if step == 0 else 0, counts[window] * self._format.per_count
            for position in range(samples):
                yield window, (start + position) % samples

    def _window(self, shard: int, number: int, stream: int) -> _Window:
        window = self._current.get(stream)
        if window is None or window.where != (shard, number):
            self._current.pop(stream, None)  # so that never more than one window of a stream is in memory
            with self._at(f"{self._files.name(shard)}, window {number}", sample=False):
                window = self._current[stream] = self._load(shard, number)
        return window

    def _load(self, shard: int, number: int) -> _Window:
        extent = self._shards[shard].windows[number]
        try:
            data = self._files.read(shard, extent.offset, extent.bytes)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self._files.name(shard)} is missing, though the manifest names it; restore it") from None
        samples: list[Raw | None] = []
        damage: list[str] = []
        with _noted(damage):  # what follows it is lost
            for members in group_by_keys(_files(data, damage)):
                samples += self._format.unpack(members)
        samples = samples[: extent.count]
        reason = "; ".join(damage) or "fewer members than the manifest says"
        return _Window((shard, number), samples + [None] * (extent.count - len(samples)), reason)


def _files(data: bytes, damage: list[str]) -> Iterator[dict[str, Any]]:
    """WebDataset's files of a piece of a tar, up to the first damage: so that the sample before it is still whole."""
    with _noted(damage):
        yield from tar_file_expander([{"url": "", "stream": io.BytesIO(data)}])


@contextmanager
def _noted(damage: list[str]) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError) as error:
        damage.append(str(error.args[0] if error.args else error).split(" @ <")[0])  # WebDataset adds the stream


def _refusal(key: str) -> str | None:
    """Why a key that a stranger's tar may have is none of ours."""
    if key.startswith("/") or ".." in key.split("/"):
        return "a key that leads out of its folder"
    if len(key) > LONGEST_KEY or not key.isprintable():  # what is not UTF-8 becomes unprintable surrogates
        return f"a key of more than {LONGEST_KEY} characters, or of unprintable ones"
    return None
