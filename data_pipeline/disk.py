"""Files that are whole or absent, and room for them. Torch-free."""

import errno
import json
import resource
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

_MOST_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that may be open at once, ``ulimit -n``
#: Files that a process keeps open to read them again: a quarter of those, as netCDF 3 takes two each, and no more than
#: fit in memory.
OPEN_FILES = 1024 if _MOST_FILES == resource.RLIM_INFINITY else min(1024, _MOST_FILES // 4)


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that nobody else takes: nodes that share a file system share process numbers."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is such a name, left by a process that was killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` if the block succeeds and is removed if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Readers see the old file or the new one; equal values give equal bytes."""
    with renamed(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextmanager
def no_room_said(folder: Path) -> Iterator[None]:
    """A full disk is a UserError, not a sample that cannot be read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: {error.strerror}; free some space or choose another run directory") from None


def check_space(folder: Path, needed: int) -> None:
    """UserError if less than ``needed`` bytes are free where ``folder`` is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free at {existing}; "
            "free some space or choose another run directory"
        )
