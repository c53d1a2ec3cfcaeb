"""The GPUs that a training is estimated on, and how many of a node's share a batch. Torch-free."""

from dataclasses import dataclass

from data_pipeline.errors import UsageError
from stpredict.estimates.gpus import Gpu

GPUS_PER_NODE = 8
MARGIN = 0.1  # of a GPU's memory, left to CUDA, NCCL, what kernels need meanwhile, and fragments


@dataclass(frozen=True)
class Machine:
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gb_s: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of each GPU."""
        return (1 - MARGIN) * self.gpu.memory_bytes

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {self.gpus_per_node}"


def gpus_of_a_node(batch_size: int, nodes: int | None, asked: int | None) -> int:
    """As many as ``asked`` for, or else eight, or the most below that among which the batch divides; on ``nodes``
    nodes, where it is said how many. UsageError where it does not divide."""
    most = max(asked or 0, 2 * GPUS_PER_NODE)
    able = [g for g in range(1, most + 1) if batch_size % ((nodes or 1) * g) == 0]
    if not able:
        those = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise UsageError(
            f"--nodes {nodes}: training.batch_size {batch_size} does not divide among {nodes} nodes; "
            f"{_or(those)} would do"
        )
    if asked is None:
        return max(g for g in able if g <= GPUS_PER_NODE)
    if asked not in able:
        on = f" on {nodes} nodes" if nodes else ""
        raise UsageError(
            f"--gpus-per-node {asked}: training.batch_size {batch_size} does not divide among them{on}; "
            f"{_or(able)} would do"
        )
    return asked


def node_counts(batch_size: int, gpus_per_node: int) -> list[int]:
    """Nodes whose ranks share the batch evenly."""
    return [n for n in range(1, batch_size // gpus_per_node + 1) if batch_size % (n * gpus_per_node) == 0]


def _or(numbers: list[int]) -> str:
    """1, 2, 4 or 8."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
