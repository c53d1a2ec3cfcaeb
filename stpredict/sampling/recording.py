"""Decoding steps as CUDA graphs: what a step launches is recorded once and replayed, without Python in between.

A step of decoding is hundreds of small kernels, and a GPU would wait for Python to launch them. Each step has a graph
of its own, in which the lengths of its caches are constants, so attention never reads what is not filled yet.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Unrecorded:
    """Steps run as they are."""

    def keep(self, name: str, values: Tensor) -> Tensor:
        return values

    def keep_caches(self, make: Callable[[], list]) -> list:
        return make()

    def run(self, number: int, step: Callable[[], int]) -> int:
        return step()


class Recording:
    """The steps of decodings that have the same shapes, on CUDA.

    The first decoding runs as it is, so that kernels are loaded and chosen; the second one records; later ones replay.
    A step may read and write only what was kept, and the model's weights, which must stay where they are.
    """

    def __init__(self):
        self._kept: dict[str, Tensor] = {}
        self._caches: list | None = None
        self._warm: set[int] = set()
        self._recorded: dict[int, tuple[Callable[[], None], int]] = {}
        self._pool = None

    def keep(self, name: str, values: Tensor) -> Tensor:
        """A tensor with these values at the same place in every decoding. ValueError where the shape is another."""
        kept = self._kept.setdefault(name, values)
        if kept.shape != values.shape:
            raise ValueError(f"{name}: recorded with shape {tuple(kept.shape)}, got {tuple(values.shape)}")
        return kept.copy_(values) if kept is not values else kept

    def keep_caches(self, make: Callable[[], list]) -> list:
        """Empty caches, the same ones in every decoding."""
        if self._caches is None:
            self._caches = make()
        for cache in self._caches:
            cache.length = 0
        return self._caches

    def run(self, number: int, step: Callable[[], int]) -> int:
        """Does the ``step`` with this ``number`` and returns what it returns."""
        if number not in self._warm:
            self._warm.add(number)
            return step()
        if number not in self._recorded:
            self._recorded[number] = self._record(step)
        replay, returned = self._recorded[number]
        replay()
        return returned

    def _record(self, step: Callable[[], int]) -> tuple[Callable[[], None], int]:
        """What does the kernels' part of the step again, and what the step returned; its kernels did not run yet."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            returned = step()
        return graph.replay, returned
