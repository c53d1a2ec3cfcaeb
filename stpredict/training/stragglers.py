"""A rank that is much slower than the others is named: all wait for it, and none of them can tell by its own times."""

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median_low

import torch

from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)
IN_A_ROW = 3  # intervals between log lines, before a rank is named
SHARE = 0.1  # of the interval that a rank must lose: three times nothing is nothing
SIZES, REPEATED = {"cpu": 256, "cuda": 2048}, 5  # of the probe: products of square matrices; the fastest counts
WORDS = {"data": "waiting for data", "forward": "its forward passes", "device": "its device (a small matrix product)"}


class Stragglers:
    """Compares over the ranks what each does by itself: waiting for its data, its forward passes (which ZeRO-3 makes
    wait for the others: there they are left out), and a small probe of its device. ``factor`` times the median is slow;
    None: nothing is measured."""

    def __init__(self, ranks: Ranks, factor: float | None, zero_stage: int):
        self.ranks, self.factor = ranks, factor
        self._timed = factor is not None and ranks.size > 1 and zero_stage < 3
        self._forward_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._slow: Counter[tuple[int, str]] = Counter()  # intervals in a row
        if factor is not None and ranks.size > 1:
            self._matrix = torch.eye(SIZES[ranks.device.type], device=ranks.device)
            self._probe()  # the first is never the fastest

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times a forward pass; on CUDA by events, which are read when a line is due."""
        if not self._timed:
            yield
        elif self.ranks.device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._forward_s += time.perf_counter() - began

    def compare(self, data_s: float, elapsed_s: float) -> list[str]:
        """What is to be said of the interval that ends here, in ``elapsed_s`` of which this rank waited ``data_s`` for
        data. On all ranks alike."""
        if self.factor is None or self.ranks.size == 1:
            return []
        times = {"data": data_s, "forward": self._take_forward_s(), "device": self._probe()}
        ranks = self.ranks.gather((socket.gethostname(), elapsed_s, times))
        said = []
        for kind, word in WORDS.items():
            usual = median_low(times[kind] for _, _, times in ranks)
            for rank, (host, elapsed_s, times) in enumerate(ranks):
                counts = kind == "device" or times[kind] - usual > SHARE * elapsed_s
                if not (counts and times[kind] > self.factor * usual):
                    del self._slow[rank, kind]
                    continue
                self._slow[rank, kind] += 1
                if self._slow[rank, kind] == IN_A_ROW:
                    said.append(
                        f"rank {rank} on {host} is slower than the others, by {word}: {times[kind]:.3g} s, "
                        f"median {usual:.3g} s, {IN_A_ROW} log lines in a row"
                    )
        return said

    def _take_forward_s(self) -> float:
        for first, last in self._events:
            last.synchronize()
            self._forward_s += first.elapsed_time(last) / 1000
        taken, self._forward_s, self._events = self._forward_s, 0.0, []
        return taken

    def _probe(self) -> float:
        """Seconds of one product, the fastest of a few."""
        fastest = float("inf")
        for _ in range(REPEATED):
            self._settle()
            began = time.perf_counter()
            self._matrix @ self._matrix
            self._settle()
            fastest = min(fastest, time.perf_counter() - began)
        return fastest

    def _settle(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
