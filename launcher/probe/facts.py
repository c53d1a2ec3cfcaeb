"""What each rank of `stpredict doctor --cluster` writes of its node: ``rank_N.json``, anew at every stage, so that of a
rank that hangs or dies it is known what it was at. Torch-free."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from stpredict.run import write_atomically

# What a rank is at, in this order.
Stage = Literal["started", "meeting", "bandwidth", "clocks", "disk", "signal", "packages", "done"]
DOING: dict[Stage, str] = {
    "started": "importing torch",
    "meeting": "finding the other ranks",
    "bandwidth": "measuring bandwidth",
    "clocks": "comparing clocks",
    "disk": "writing and reading",
    "signal": "waiting for the warning signal",
    "packages": "trying what jobs import",
    "done": "done",
}


class Transfer(BaseModel):
    """An all-reduce of so many ``bytes``: median ``seconds``, and the bus bandwidth in bytes/s as nccl-tests count it:
    bytes / seconds · 2 (n - 1) / n, which does not depend on the number n of ranks."""

    bytes: int
    seconds: float
    bus_bandwidth: float


class Disk(BaseModel):
    """Of the folder in which runs would lie, while every node writes at once. Bytes, and bytes/s."""

    free: int
    write: float
    read: float


class RankFacts(BaseModel):
    rank: int
    stage: Stage = "started"
    host: str
    local_rank: int
    python: str
    executable: str
    code: str
    cpus: int
    versions: dict[str, str] = {}
    gpus: list[str] = []
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    backend: str = ""
    hosts: list[str] = []  # of all ranks, as gathered from them
    transfers: list[Transfer] = []
    clock_s: float | None = None  # how far this node's clock is ahead of rank 0's
    clock_error_s: float | None = None
    disk: Disk | None = None
    nodes_seen: list[str] = []  # hosts whose files this node found in the common folder
    scontrol: str | None = None  # None: works; otherwise why not
    signal: str | None = None  # the one that came
    packages: list[tuple[str, str, str]] = []  # name, state, detail, as `stpredict doctor` finds them on this node

    def write(self, folder: Path) -> None:
        write_atomically(folder / f"rank_{self.rank}.json", self.model_dump_json(indent=1) + "\n")


def read_facts(folder: Path) -> list[RankFacts]:
    """What the ranks have written so far, by rank."""
    found = [RankFacts.model_validate_json(path.read_text()) for path in folder.glob("rank_*.json")]
    return sorted(found, key=lambda facts: facts.rank)
