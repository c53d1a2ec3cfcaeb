"""This process's place among the ranks, and the few collectives that the engine needs besides DeepSpeed's."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import UsageError

# Ranks wait for each other's files here (an export, a share of the latents); who dies meanwhile is the launcher's care.
CONTROL_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """``control`` is a gloo group for numbers that live on the CPU, so that they never wait for a GPU."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank: what all must decide alike is decided there."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def warning(self) -> int:
        """The level of what all ranks would warn of alike: rank 0 does; in the others' files it is information."""
        return logging.WARNING if self.is_main else logging.INFO

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` (on the CPU) summed over the ranks, in place."""
        dist.all_reduce(tensor, group=self.control)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of each element of ``tensor`` (on the CPU) over the ranks, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.control)


@contextmanager
def join_ranks(timeout: timedelta = timedelta(minutes=30)) -> Iterator[Ranks]:
    """Joins the process group described by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR / MASTER_PORT, and leaves it
    when all went well.

    nccl where there is CUDA, gloo otherwise; alone, where there is no such environment. DeepSpeed, where it is used,
    takes over this group.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _gpu()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    dist.destroy_process_group()  # not after an error: the other ranks may never come


def _gpu() -> int:
    """This rank's GPU: the one that it sees, where each task sees its own; else that of its place on the node."""
    local_rank, visible = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if visible == 1 and "SLURM_STEP_ID" in os.environ:
        return 0
    if local_rank >= visible:
        raise UsageError(
            f"{per_node} processes on this machine, but {visible} GPUs: set resources.processes to at most {visible}"
        )
    return local_rank
