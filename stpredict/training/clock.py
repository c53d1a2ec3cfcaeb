"""What steps take."""

import time


class StepClock:
    """Means over the steps since the last reading: step time, samples/s, share of it spent waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.last = time.perf_counter()
        self.steps, self.waiting_s, self.elapsed_s = 0, 0.0, 0.0

    def data_ready(self) -> None:
        self.waiting_s += time.perf_counter() - self.last

    def step_done(self) -> None:
        at = time.perf_counter()
        self.elapsed_s += at - self.last
        self.last, self.steps = at, self.steps + 1

    def values(self, batch_size: int) -> dict[str, float]:
        elapsed = max(self.elapsed_s, 1e-9)
        values = {
            "step_s": elapsed / max(1, self.steps),
            "samples_per_s": self.steps * batch_size / elapsed,
            "data_wait_share": self.waiting_s / elapsed,
        }
        self.restart()
        return values
