"""Writes one WebDataset tar with the byte offsets of its windows, byte for byte the same for the same samples."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

from data_pipeline.disk import temporary_path, write_json
from data_pipeline.manifest import Description, Moments, Shard, ShardRecord, file_sha256, shard_name


class TarShard:
    """One shard being written. It bears a temporary name until ``finish`` renames it and writes its NAME.json.

    A window ends before the member that would take it past ``window_bytes``.
    """

    def __init__(self, folder: Path, index: int, window_bytes: int):
        import webdataset  # here, because it imports torch

        self._folder, self._name, self._window_bytes = folder, shard_name(index), window_bytes
        self._temporary = temporary_path(folder / f"{self._name}.tar")
        self._file = self._temporary.open("wb")
        self._tar = webdataset.TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        self._windows: list[tuple[int, int]] = []  # bytes, samples
        self._start = self._count = 0

    def add(
        self, key: str, members: dict[str, bytes], description: dict[str, Any] | None = None, count: int = 1
    ) -> None:
        """Appends KEY.extension for every extension in ``members``, and KEY.json of ``description``; together
        ``count`` samples."""
        before = self._tar.tarstream.offset
        if description is not None:
            members = members | {"json": json.dumps(description, sort_keys=True, ensure_ascii=False).encode()}
        self._tar.write({"__key__": key, **members})
        if self._count and self._tar.tarstream.offset - self._start > self._window_bytes:
            self._end_window(before)
        self._count += count

    def finish(
        self,
        description: Description,
        shards: int,
        plan: str,
        skipped: dict[str, str] | None = None,
        moments: Moments | None = None,
    ) -> None:
        """Closes and renames the tar, then writes NAME.json; ``shards`` is the number of shards in the set, ``skipped``
        gives for each key that was left out the reason."""
        if self._count:
            self._end_window(self._tar.tarstream.offset)
        end = self._tar.tarstream.offset
        self._tar.close()
        # A tar ends with two empty blocks. tarfile fills up to 10 kB, for tapes: as much again as some latent shards.
        self._file.truncate(end + 2 * tarfile.BLOCKSIZE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shard = Shard(
            name=self._name,
            samples=sum(count for _, count in self._windows),
            bytes=self._temporary.stat().st_size,
            sha256=file_sha256(self._temporary),
            window_bytes=[size for size, _ in self._windows],
            window_samples=[count for _, count in self._windows],
        )
        about = {"shards": shards, "plan": plan, "skipped": skipped or {}, "moments": moments}
        record = ShardRecord(shard=shard, set=description, **about)
        self._temporary.replace(self._folder / f"{self._name}.tar")
        write_json(self._folder / f"{self._name}.json", record.model_dump(mode="json", exclude_none=True))

    def discard(self) -> None:
        """Removes the unfinished tar; does nothing after ``finish``."""
        self._temporary.unlink(missing_ok=True)
        self._tar.close()
        self._file.close()

    def _end_window(self, end: int) -> None:
        self._windows.append((end - self._start, self._count))
        self._start, self._count = end, 0
