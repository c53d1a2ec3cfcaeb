"""Shards of an object store on local disk: downloaded once per machine, checked, the least recently read dropped first.

``ShardFiles`` is what readers use: bytes of a shard by its number, wherever it lies.

A cache folder holds ``SHA256.tar`` (whole shards that had this hash when they came: equal names of two sets never
meet), hidden temporary files of downloads under way, and ``locks/``. The locks are flock's, by filelock: the kernel
drops them when their process dies. The folder belongs on a disk of the machine. On a file system that several nodes
share it works where flock reaches across them (NFS since version 4; Lustre mounted with ``flock``, not ``localflock``).
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from data_pipeline.config import CacheConfig
from data_pipeline.disk import is_temporary, temporary_path
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import Shard
from data_pipeline.storage import check, child, is_local, read_range

log = logging.getLogger(__name__)

_OWN = re.compile(r"[0-9a-f]{64}\.tar|\.[0-9a-f]{64}\.tar\.[0-9a-f]{32}\.tmp")  # names of files here
_CHUNK = 16 * 2**20  # bytes of one request: what a lost connection costs
_TRIES = 10  # to read a file before others drop it
_POLL_S = 0.2  # between looks for room that other downloads take


class ShardFiles:
    """Bytes of the tars of a set: ``shards[i]`` lies in ``folders[i]``.

    Local ones are read where they are; remote ones from ``cache``, which downloads them whole, or without one by
    requests for just the bytes. UsageError for a folder whose scheme is not read.
    """

    def __init__(self, folders: Sequence[str], shards: Sequence[Shard], cache: CacheConfig | None = None):
        self._names = [child(folder, f"{shard.name}.tar") for folder, shard in zip(folders, shards, strict=True)]
        self._shards = shards
        self._cache = ShardCache(cache) if cache else None
        for folder in dict.fromkeys(folders):
            check(folder)

    def name(self, number: int) -> str:
        """Where shard ``number`` lies, for messages."""
        return self._names[number]

    def read(self, number: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes of shard ``number`` from ``offset`` on. Errors as of ``storage.read_range`` and
        ``ShardCache.path``."""
        name = self._names[number]
        if self._cache is None or is_local(name):
            return read_range(name, offset, size)
        for _ in range(_TRIES):
            path = self._cache.path(name, self._shards[number])
            try:
                return read_range(path, offset, size)
            except FileNotFoundError:  # dropped since: others needed the room
                continue
        raise UserError(f"{name}: dropped from the cache before it could be read; give the cache more bytes")


class ShardCache:
    """Local files of remote shards, of at most ``config.bytes`` bytes together, for any number of processes.

    A file may be dropped while another process reads it: on POSIX it stays readable until it is closed.
    """

    def __init__(self, config: CacheConfig):
        self._config, self._folder = config, config.folder.absolute()

    def path(self, location: str, shard: Shard) -> Path:
        """A local file with the bytes of ``shard``, which lies at ``location``; the first process that asks downloads
        it, others that ask meanwhile wait. Its sha256 was checked when it came, its size is checked now.

        FileNotFoundError where there is no such file; UsageError where ``shard`` exceeds the whole cache; UserError
        where what comes is not what the manifest says, twice, where the network fails, or the cache cannot be written.
        """
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it names a file: never what a forged manifest likes
            raise UserError(f"{location}: the manifest's sha256 of it is none; make the manifest again")
        if shard.bytes > self._config.bytes:
            raise UsageError(
                f"{location}: {shard.bytes} bytes, and the cache {self._folder} may hold {self._config.bytes}; "
                "give it more bytes"
            )
        path = self._folder / f"{shard.sha256}.tar"
        try:
            if not _use(path, shard.bytes):
                (self._folder / "locks").mkdir(parents=True, exist_ok=True)
                with self._lock(_stripe(path)):
                    if not _use(path, shard.bytes):  # nobody else has fetched it meanwhile
                        self._fetch(location, shard, path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self._folder}: cannot keep shards here: {error.strerror or error}") from error
        return path

    def _fetch(self, location: str, shard: Shard, path: Path) -> None:
        for _ in range(2):
            with self._room(path, shard.bytes) as temporary:
                problem = _download(location, shard, temporary)
                if problem is None:
                    with self._lock("room"):  # who counts sees the one name or the other
                        temporary.replace(path)
                    return
            log.warning("%s: thrown away: %s", location, problem)
        raise UserError(f"{location}: {problem}, twice: it is damaged, or another than the manifest's; write it again")

    @contextmanager
    def _room(self, path: Path, size: int) -> Iterator[Path]:
        """A temporary file of ``size`` bytes for ``path``, which counts as part of the cache from the beginning."""
        temporary = temporary_path(path)
        while not self._reserve(temporary, _stripe(path), size):
            time.sleep(_POLL_S)  # all is taken by downloads under way
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, stripe: str, size: int) -> bool:
        """Drops as much as is needed of what was read longest ago; False if that is not enough."""
        with self._lock("room"):
            self._remove_leftovers(stripe)
            taken = self._taken()
            kept = sorted((stat.st_mtime_ns, stat.st_size, entry) for entry, stat in taken if not is_temporary(entry))
            excess = sum(stat.st_size for _, stat in taken) + size - self._config.bytes
            if excess > sum(kept_size for _, kept_size, _ in kept):
                return False
            for _, kept_size, entry in kept:
                if excess <= 0:
                    break
                entry.unlink()
                excess -= kept_size
            with temporary.open("xb") as file:
                file.truncate(size)
        return True

    def _taken(self) -> list[tuple[Path, os.stat_result]]:
        """The cache's own files; whatever else lies in the folder is neither counted nor touched."""
        taken = []
        for entry in self._folder.iterdir():
            if _OWN.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # a download that has just failed
                    taken.append((entry, entry.stat()))
        return taken

    def _remove_leftovers(self, own_stripe: str) -> None:
        """Of killed downloads: those whose lock is free. The caller's own lock has no download yet."""
        for entry in (entry for entry, _ in self._taken() if is_temporary(entry)):
            stripe = _stripe(entry)
            try:
                with self._lock(stripe, wait=False) if stripe != own_stripe else nullcontext():
                    entry.unlink(missing_ok=True)
            except Timeout:
                continue

    def _lock(self, name: str, wait: bool = True) -> FileLock:
        return FileLock(self._folder / "locks" / name, blocking=wait)


def _stripe(path: Path) -> str:
    """The lock of a shard's downloads: one of 4096, so that locks need no tidying and two downloads seldom share."""
    return path.name.lstrip(".")[:3]


def _use(path: Path, size: int) -> bool:
    """Whether ``path`` is there with ``size`` bytes; it is then marked as read last."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(location: str, shard: Shard, path: Path) -> str | None:
    """``location`` → ``path``, which exists. Returns what is wrong with it, if anything."""
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        for offset in range(0, shard.bytes, _CHUNK):
            expected = min(_CHUNK, shard.bytes - offset)
            data = read_range(location, offset, expected)
            if len(data) < expected:
                return f"ends after {offset + len(data)} bytes, {shard.bytes} expected"
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave zeros under the final name
    if digest.hexdigest() != shard.sha256:
        return "its sha256 differs from the manifest's"
    return None
