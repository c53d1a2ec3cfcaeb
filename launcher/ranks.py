"""The ranks that this process is one of: from torch.distributed's environment (torchrun, the local executor) or from
a SLURM step. Nothing is guessed: a shell inside `salloc` or `sbatch` is not a step, since only `srun` makes one.
"""

import os
import re
from typing import NamedTuple

from data_pipeline.errors import UsageError


class Ranks(NamedTuple):
    rank: int
    world_size: int


def join() -> Ranks | None:
    """This process's place among its ranks, exported for torch.distributed; None where it stands alone. UsageError
    where the environment says that there are others but not where."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        place = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"environment: rank {place.rank} of {place.world_size} without {' and '.join(missing)}; start it with "
                "torchrun or srun, set them, or unset RANK and WORLD_SIZE to have the ranks started here"
            )
        return place
    step = slurm_step(os.environ)
    if step is None:
        return None
    os.environ.update(step)
    return Ranks(int(step["RANK"]), int(step["WORLD_SIZE"]))


def slurm_step(environment: os._Environ | dict[str, str], least: int = 2) -> dict[str, str] | None:
    """torch.distributed's variables for a task of an srun step; None outside a step and in one of less than ``least``.

    (`srun --pty bash` is a step of one task: what is started there is a person's own command.) Which GPUs are
    visible stays as SLURM set it: DeepSpeed picks its own by LOCAL_RANK among all of the node's.
    """
    if "SLURM_STEP_ID" not in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < least:
        return None
    tasks = expand_tasks(environment["SLURM_STEP_TASKS_PER_NODE"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": environment.get("MASTER_PORT", str(10_000 + (job * 31 + step) % 20_000)),
    }


def first_node(nodes: str) -> str:
    """First name of SLURM's list: ``gpu[003-006,9],login`` → ``gpu003``."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]


def expand_tasks(tasks: str) -> list[int]:
    """Tasks of each node from SLURM's short form: ``2(x3),1`` → ``[2, 2, 2, 1]``."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]
