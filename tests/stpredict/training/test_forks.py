"""What is kept from forks is not in a fork, and nothing else is missing there."""

import mmap
import multiprocessing
from pathlib import Path

import torch

from stpredict.training.forks import LARGE, keep_from_forks


def mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(stop, 16) for first, stop in ranges)


def look(addresses: list[int], queue) -> None:
    queue.put([mapped(address) for address in addresses])


def test_large_storages_stay_out_of_forks():
    state, small = torch.zeros(LARGE // 4 + 1000), torch.zeros(LARGE // 4 - 1)
    views = [state[:10], state[1000:], small]
    inner = state.data_ptr() + LARGE // 2
    kept = keep_from_forks(views)

    assert LARGE - 2 * mmap.PAGESIZE < kept <= LARGE + 4000  # once, though there are two views of it
    addresses = [inner, small.data_ptr() + LARGE // 2]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=look, args=(addresses, queue))
    process.start()
    found = queue.get()
    process.join()
    assert found == [False, True]
    assert process.exitcode == 0
    assert [mapped(address) for address in addresses] == [True, True]
