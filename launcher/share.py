"""What each of several jobs on one machine gets of it: CPU threads, and GPUs that no other job has meanwhile."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from stpredict.jobs.config import JobConfig

WITHOUT_GPU = ("shard", "evaluate", "report", "study_report")  # kinds of jobs
ASK_S = 30.0


def threads_of(config: JobConfig, jobs: int, cores: int) -> int:
    """CPU threads of each rank where ``jobs`` run at once and nobody says how many."""
    return max(1, cores // jobs // config.resources.processes)


def gpus_here(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    ask = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=ASK_S)
    return answer.stdout.split() if answer.returncode == 0 else []


class Gpus:
    """Who has which GPU: one for each rank, and never two jobs on one."""

    def __init__(self, there: Sequence[str]):
        self.there = list(there)
        self.taken: dict[str, list[str]] = {}

    def take(self, job: str, config: JobConfig) -> list[str] | None:
        """GPUs for ``job``; None while too few are free. One with more ranks than there are GPUs gets all, and says
        itself that they are too few."""
        ranks = 0 if config.kind in WITHOUT_GPU else config.resources.processes
        free = [gpu for gpu in self.there if not any(gpu in others for others in self.taken.values())]
        wanted = min(ranks, len(self.there))
        if wanted > len(free):
            return None
        self.taken[job] = free[:wanted]
        return self.taken[job]

    def give_back(self, job: str) -> None:
        del self.taken[job]
