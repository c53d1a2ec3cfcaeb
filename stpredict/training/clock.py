"""What steps take."""

import time

import numpy as np


class StepClock:
    """Times of the steps since the last reading: each step, and waiting for data in all of them."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.last = time.perf_counter()
        self.began = self.last  # of the step that is going on
        self.step_s: list[float] = []
        self.waiting_s = self.drained_s = 0.0

    def skip(self) -> None:
        """What was done since the last step, a validation for instance, is no part of the next one."""
        self.last = self.began = time.perf_counter()

    def data_ready(self) -> None:
        at = time.perf_counter()
        self.waiting_s += at - self.last
        self.last = at

    def step_done(self) -> None:
        self.last = time.perf_counter()
        self.step_s.append(self.last - self.began)
        self.began = self.last

    def drained(self) -> None:
        """A GPU has ended what it was given: its work is part of the interval, whichever step it was of."""
        self.drained_s += time.perf_counter() - self.last
        self.skip()

    @property
    def elapsed_s(self) -> float:
        return max(sum(self.step_s) + self.drained_s, 1e-9)

    @property
    def steps(self) -> int:
        return len(self.step_s)

    def percentiles(self) -> dict[str, float]:
        """Seconds of the median step, and those that nine in ten and 99 in 100 steps do not exceed."""
        points = (50, 90, 99)
        values = np.percentile(self.step_s, points)
        return {f"step_s_p{point}": float(value) for point, value in zip(points, values, strict=True)}
