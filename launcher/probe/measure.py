"""What is measured between ranks and of the disk: collective bandwidth, clocks, writing and reading."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from launcher.probe.facts import Disk, Transfer

MIB = 2**20
SIZES = {"cuda": (MIB, 16 * MIB, 256 * MIB, 1024 * MIB), "cpu": (MIB // 16, MIB, 16 * MIB)}
WARM_UP, ROUNDS = 3, 9
FILE = 128 * MIB
PINGS = 25


def transfers(device: torch.device) -> list[Transfer]:
    """All-reduces of several sizes over all ranks. Every rank has to call it."""
    return [_transfer(size, device) for size in SIZES[device.type]]


def _transfer(size: int, device: torch.device) -> Transfer:
    x = torch.zeros(size // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        _finish(device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        _finish(device)
        seconds.append(time.perf_counter() - began)
    typical = torch.tensor([median(seconds[WARM_UP:])], dtype=torch.float64, device=device)
    dist.all_reduce(typical, dist.ReduceOp.MAX)  # the slowest rank's
    n = dist.get_world_size()
    return Transfer(bytes=size, seconds=typical.item(), bus_bandwidth=size / typical.item() * 2 * (n - 1) / n)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_offset(first_ranks: Sequence[int]) -> tuple[float, float]:
    """Seconds that this node's clock is ahead of rank 0's, and by how much that may be wrong; 0 on rank 0.

    ``first_ranks`` are the first of every node. Rank 0 sends each its messages one after another; the one that came
    back soonest tells most: half its way is the uncertainty.
    """
    me = dist.get_rank()
    found = torch.zeros(2, dtype=torch.float64)
    for other in first_ranks:
        if other == 0:
            continue
        if me == 0:
            dist.send(torch.tensor(min(_ping(other) for _ in range(PINGS)), dtype=torch.float64)[[1, 0]], other)
        elif me == other:
            for _ in range(PINGS):
                _pong()
            dist.recv(found, 0)
    return found[0].item(), found[1].item()


def _ping(other: int) -> tuple[float, float]:
    """Half the time that a message took there and back, and how far the other's clock was ahead in the middle of it."""
    theirs = torch.zeros(1, dtype=torch.float64)
    sent = time.time()
    dist.send(theirs, other)
    dist.recv(theirs, other)
    back = time.time()
    return (back - sent) / 2, theirs.item() - (sent + back) / 2


def _pong() -> None:
    message = torch.zeros(1, dtype=torch.float64)
    dist.recv(message, 0)
    message[0] = time.time()
    dist.send(message, 0)


def disk(folder: Path, nodes: int, node: int | None) -> Disk | None:
    """Every node writes a file into ``folder`` and then reads another node's, all at once. Every rank has to call it;
    ``node`` is the number of this rank's node if it is its first rank, and otherwise None, as is the result.

    Where there is but one node, its own file is dropped from its memory before it is read.
    """
    mine = folder / f"node_{node}.bin"
    wrote = read = 0.0
    if node is not None:
        content = os.urandom(MIB) * (FILE // MIB)
        began = time.perf_counter()
        with mine.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    if node is not None:
        began = time.perf_counter()
        other = folder / f"node_{(node + 1) % nodes}.bin"
        size = len(other.read_bytes())
        read = time.perf_counter() - began
        if size != FILE:
            raise OSError(0, f"has {size} bytes here and {FILE} on the node that wrote it", str(other))
    dist.barrier()
    if node is None:
        return None
    mine.unlink()
    return Disk(free=shutil.disk_usage(folder).free, write=FILE / wrote, read=FILE / read)
