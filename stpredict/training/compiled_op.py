"""DeepSpeed's CPU op, compiled once for each environment, and no start that waits for a compiler that was killed."""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def extensions_folder() -> Path:
    """Where torch compiles extensions: in this environment, if it may be written to, since those of two environments
    differ and would replace each other in the user's cache; else where TORCH_EXTENSIONS_DIR or torch says."""
    own = Path(sys.prefix)
    if "TORCH_EXTENSIONS_DIR" not in os.environ and sys.prefix != sys.base_prefix and os.access(own, os.W_OK):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(own / "torch_extensions")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def load_compiled_op() -> None:
    """Loads the shared-memory op that DeepSpeed uses on CPU; compiles it (about 20 s) where that was not done yet.

    torch marks a compilation by a file named ``lock``; a process killed at that moment leaves it, and all later ones
    would wait for ever. Here they take turns by a lock of the kernel's, which dies with its holder: so a ``lock`` that
    is there in one's turn is such a leftover.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    folder = extensions_folder()
    with _turn(folder / f"{builder.name}.turn") as alone:
        if not any(folder.glob(f"**/{builder.name}.so")):
            log.info("compiling DeepSpeed's CPU op into %s, once: about 20 s", folder)
        for lock in folder.glob(f"**/{builder.name}/lock") if alone else ():
            lock.unlink(missing_ok=True)
            log.warning("%s: left by a process that was killed; removed", lock)
        builder.load(verbose=False)


@contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Holds ``path`` alone among the processes that come here. False, at once, where the file system has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: no file locks here (%s)", path, error.strerror)
            yield False
        else:
            yield True
