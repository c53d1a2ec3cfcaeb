"""torch.profiler over a few steps, when the config or a person asks for it."""

import logging
import time

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from stpredict.run import Run
from stpredict.training.config import ProfileConfig
from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # a look at a shared file system may take milliseconds


class Profiler:
    """Writes RUN/profiles/step_N_rank_R.json.gz, N the first step that is in it.

    Asked for by the config, or by a file RUN/profile that may hold the number of steps. Rank 0 alone looks; the ranks
    begin together because what it saw is part of what they agree on before a step anyway.
    """

    def __init__(self, run: Run, config: ProfileConfig | None, ranks: Ranks):
        self.run, self.config, self.ranks = run, config, ranks
        self.request = run.path / "profile"
        self._looked = 0.0
        self._profile: profile | None = None

    def wanted(self, step: int) -> int:
        """How many steps are to be profiled from ``step`` (counted from 1) on; 0 on ranks that do not decide."""
        if not self.ranks.is_main or self._profile is not None:
            return 0
        if self.config and step == self.config.step:
            return self.config.steps
        at = time.monotonic()
        if at - self._looked < LOOK_EVERY_S:
            return 0
        self._looked = at
        return self._requested()

    def start(self, step: int, steps: int) -> None:
        self.first, self.last = step, step + steps - 1
        cuda = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._profile.start()
        self._mark(step)
        log.info("profiling steps %d to %d", self.first, self.last)

    def step_done(self, step: int) -> bool:
        """To be told of every step. Whether it wrote the trace, which takes seconds."""
        if self._profile is None:
            return False
        self._span.__exit__(None, None, None)
        if step < self.last:
            self._mark(step + 1)
            return False
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # what the step gave the GPU belongs to it
        self._profile.stop()
        folder = self.run.path / "profiles"
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"step_{self.first}_rank_{self.ranks.rank}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
        log.info("profiled steps %d to %d: %s; look at it in https://ui.perfetto.dev", self.first, self.last, trace)
        return True

    def close(self) -> None:
        """Ends what is going on, without a trace."""
        if self._profile is not None:
            log.log(self.ranks.warning, "no profile: steps %d to %d were not all made", self.first, self.last)
            self._span.__exit__(None, None, None)
            self._profile.stop()
            self._profile = None

    def _mark(self, step: int) -> None:
        self._span = record_function(f"training step {step}")
        self._span.__enter__()

    def _requested(self) -> int:
        try:
            text = self.request.read_text().strip()
            self.request.unlink()
        except FileNotFoundError:
            return 0
        except OSError as error:
            log.warning("no profile: %s", error)
            return 0
        if not text:
            return ProfileConfig.model_fields["steps"].default
        if not text.isdecimal() or not int(text):
            log.warning("no profile: %s holds %r, not a number of steps", self.request, text[:40])
            return 0
        return int(text)
