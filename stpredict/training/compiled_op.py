"""DeepSpeed's CPU ops, compiled once for each environment, and no start that waits for a compiler that was killed."""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from data_pipeline.errors import UserError

log = logging.getLogger(__name__)
SHARED_MEMORY, CPU_ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"


def extensions_folder() -> Path:
    """Where torch compiles extensions: in this environment, if it may be written to, since those of two environments
    differ and would replace each other in the user's cache; else where TORCH_EXTENSIONS_DIR or torch says."""
    own = Path(sys.prefix)
    if "TORCH_EXTENSIONS_DIR" not in os.environ and sys.prefix != sys.base_prefix and os.access(own, os.W_OK):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(own / "torch_extensions")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


@cache  # a second engine of this process need not wait for its turn
def load_compiled_op(builder_name: str = SHARED_MEMORY) -> None:
    """Loads an op: the one that DeepSpeed communicates by on a CPU, or the Adam of offloaded optimizers. Compiles it
    (about 20 s) where that was not done yet. UserError where it cannot be.

    torch marks a compilation by a file named ``lock``; a process killed at that moment leaves it, and all later ones
    would wait for ever. Here they take turns by a lock of the kernel's, which dies with its holder: so a ``lock`` that
    is there in one's turn is such a leftover.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    folder = extensions_folder()
    with _turn(folder / f"{builder.name}.turn") as alone:
        if not any(folder.glob(f"**/{builder.name}.so")):
            log.info("compiling DeepSpeed's %s into %s, once: about 20 s", builder.name, folder)
        for lock in folder.glob(f"**/{builder.name}/lock") if alone else ():
            lock.unlink(missing_ok=True)
            log.warning("%s: left by a process that was killed; removed", lock)
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            raise UserError(f"DeepSpeed's {builder.name} cannot be compiled here: {lines[-1]}") from error


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
