"""Reads samples of a shard set by their slot, one window of one tar at a time.

A window is read with one request and kept, still encoded, until its stream moves on. A sample that cannot be read is
replaced by the next one of its window that can, or failing that of its shard: positions never move.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipeline.decode import DecodeError
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Slot
from data_pipeline.storage import child, read_range

Raw = dict[str, Any]  # a sample as the tar has it


class Format(Protocol):
    """What the members of a tar mean."""

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        """WebDataset's dictionary of one key → the samples in it; each has at least ``key``."""

    def sample(self, raw: Raw, epoch: int) -> dict[str, Any]:
        """One sample, ready for a batch. Raises DecodeError if it is unreadable."""


@dataclass
class Reading:
    """A sample, and the unreadable ones (key → reason) met before it; the slot's own is the first of those."""

    sample: dict[str, Any]
    unreadable: dict[str, str] = field(default_factory=dict)


class WindowReader:
    """``read`` gives the sample at a slot. ``stream`` says on whose behalf: each keeps its current window."""

    def __init__(self, folder: str, manifest: Manifest, format: Format):
        self._folder, self._manifest, self._format = folder, manifest, format
        self._current: dict[int, tuple[tuple[int, int], list[Raw | None]]] = {}

    def read(self, slot: Slot, stream: int = 0) -> Reading:
        """The sample at ``slot`` or what replaces it. UserError if nothing in the shard is readable."""
        unreadable: dict[str, str] = {}
        for window, position in self._candidates(slot):
            raw = self._window(slot.shard, window, stream)[position]
            try:
                if raw is None:
                    raise DecodeError("missing in the tar, which is damaged: `stpredict inspect --verify` tells more")
                return Reading(self._format.sample(raw, slot.epoch), unreadable)
            except DecodeError as error:
                name = raw["key"] if raw else f"{self._name(slot.shard)}, window {window}, sample {position}"
                unreadable[name] = str(error)
        raise UserError(f"{self._name(slot.shard)}: no sample can be read; {name}: {unreadable[name]}")

    def _candidates(self, slot: Slot) -> Iterator[tuple[int, int]]:
        """The slot's own window from its position on, round; then the other windows of the shard."""
        windows = self._manifest.shards[slot.shard].windows
        for step in range(len(windows)):
            window = (slot.window + step) % len(windows)
            start = slot.position if step == 0 else 0
            for position in range(windows[window].count):
                yield window, (start + position) % windows[window].count

    def _window(self, shard: int, window: int, stream: int) -> list[Raw | None]:
        where, samples = self._current.get(stream, (None, []))
        if where != (shard, window):
            samples = self._load(shard, window)
            self._current[stream] = (shard, window), samples
        return samples

    def _load(self, shard: int, window: int) -> list[Raw | None]:
        """Exactly as many entries as the manifest says; None where a damaged tar has no more to give."""
        extent = self._manifest.shards[shard].windows[window]
        try:
            data = read_range(self._name(shard), extent.offset, extent.bytes)
        except FileNotFoundError:
            raise UserError(f"{self._name(shard)} is missing, though the manifest names it; restore it") from None
        samples: list[Raw | None] = []
        for members in _members(data):
            samples += self._format.unpack(members)
        samples = samples[: extent.count]
        return samples + [None] * (extent.count - len(samples))

    def _name(self, shard: int) -> str:
        return child(self._folder, f"{self._manifest.shards[shard].name}.tar")


def _members(data: bytes) -> Iterator[dict[str, Any]]:
    """WebDataset's samples in a piece of a tar, up to the first damage."""
    source = {"url": "", "stream": io.BytesIO(data)}
    try:
        yield from group_by_keys(tar_file_expander([source]))
    except (tarfile.TarError, EOFError, ValueError):
        return
