"""This process's place among the ranks, and the few collectives that the engine needs besides DeepSpeed's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """``control`` is a gloo group for numbers that live on the CPU, so that they never wait for a GPU."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` (on the CPU) summed over the ranks, in place."""
        dist.all_reduce(tensor, group=self.control)
        return tensor

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
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    control = dist.new_group(backend="gloo", timeout=timeout)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    dist.destroy_process_group()  # not after an error: the other ranks may never come
