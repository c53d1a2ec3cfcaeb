"""This process's place among the ranks, and the few collectives that the engine needs besides DeepSpeed's."""

import os
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


def join_ranks(timeout: timedelta = timedelta(minutes=30)) -> Ranks:
    """Joins the process group described by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR / MASTER_PORT.

    nccl where there is CUDA, gloo otherwise. The first gloo start of a machine compiles DeepSpeed's
    shared-memory op (about 20 s; `stpredict doctor` does it ahead).
    """
    import deepspeed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, control)


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
