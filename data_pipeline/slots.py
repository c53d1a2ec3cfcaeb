"""Arrays from data workers to the main process through memory that both have had since before the fork.

The usual ways need the sender's help to the end: a pipe may hold half of an array, a file descriptor is handed over by
a thread of the worker. If the worker then dies or hangs, the receiver waits for ever. Here only a few bytes travel by
the pipe, in one piece, to say where the array lies. It also needs no /dev/shm, which containers keep small.
"""

import mmap
from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Stored:
    """Where an array lies in the slots."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class Slots:
    """For each of ``workers`` workers a ring of ``count`` slots of ``size`` bytes; item number i of a worker is put
    into slot i mod ``count``, over what was there."""

    def __init__(self, workers: int, count: int, size: int):
        self._count, self._size = count, size
        self._memory = mmap.mmap(-1, max(1, workers * count * size))

    def put(self, worker: int, number: int, array: np.ndarray) -> Stored:
        """Copies ``array`` into the slot of item ``number`` of ``worker``. ValueError if it is larger than a slot."""
        if array.nbytes > self._size:
            raise ValueError(f"an array of {array.nbytes} bytes, {self._size} were expected at most")
        stored = Stored((worker * self._count + number % self._count) * self._size, array.dtype.str, array.shape)
        self.get(stored)[...] = array
        return stored

    def get(self, stored: Stored) -> np.ndarray:
        """A view, good until its slot is filled anew."""
        values = np.frombuffer(self._memory, stored.dtype, count=prod(stored.shape), offset=stored.offset)
        return values.reshape(stored.shape)
