"""Where a rank's log goes. Torch-free.

Under the local executor a rank's whole output is its logs/rank_N.log. Ranks that torchrun or srun started share a
terminal: there each one writes its file itself, and the terminal gets rank 0's lines and everybody's warnings.
"""

import logging
import sys
from pathlib import Path
from typing import IO

from stpredict.run import Run, now

FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def log_to(run: Run, rank: int, world_size: int, shared_terminal: bool) -> None:
    """Sets up this process's logging, as rank ``rank`` of ``world_size`` that fills ``run``."""
    terminal = logging.StreamHandler(sys.stderr)
    handlers: list[logging.Handler] = [terminal]
    if shared_terminal:
        logging.captureWarnings(True)
        handlers.append(RankFile(run.log_path(rank), f"rank {rank} of {world_size}"))
        if rank:
            terminal.setLevel(logging.WARNING)
            terminal.setFormatter(logging.Formatter(FORMAT.replace("%(message)", f"rank {rank}: %(message)")))
    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=handlers, force=True)


class RankFile(logging.FileHandler):
    """Appends to a log that begins with the first line: a rank of a job that rank 0 refuses to start leaves none in the
    directory, which may be another job's."""

    def __init__(self, path: Path, who: str):
        self.who = who
        super().__init__(path, delay=True)

    def _open(self) -> IO[str]:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        file = super()._open()
        file.write(f"=== {now()} {self.who}: {' '.join(sys.argv)}\n")
        return file
