"""Whether a training diverged: such a trial is shown, named, and no part of any fit. Torch-free.

A training diverged whose validation is not finite, which its guards gave up, or whose training loss ended above where
it began. Over-fitting, a validation loss that rises while the training loss falls, is no divergence.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from stpredict.run import Status
from stpredict.training.guards import GIVEN_UP

FEW = 5  # lines, from which on their noise can be told
WINDOW = 20  # lines at most whose median is the loss at the beginning, or at the end
TO_SIGMA = 1.4826  # from the median absolute value of a normal distribution around 0 to its standard deviation
ABOVE = 4  # standard errors of the difference of two medians: less is noise


def how_it_diverged(
    status: Status | None, validations: Sequence[tuple[int, float]], training: Sequence[tuple[int, float]]
) -> str | None:
    """In words; None if it did not. ``validations`` and ``training`` are (step, loss) in their order."""
    if (step := _not_finite(validations)) is not None:
        return f"its validation at step {step} is not finite"
    if status and status.state == "failed" and any(words in (status.error or "") for words in GIVEN_UP):
        return f"its training gave up: {status.error}"
    if training and not math.isfinite(training[-1][1]):
        return f"its training loss at step {training[-1][0]} is not finite"
    if status is None or status.state == "running":  # it may come back
        return None
    return _ended_above([loss for _, loss in training if math.isfinite(loss)])


def _not_finite(losses: Sequence[tuple[int, Any]]) -> int | None:
    return next((step for step, loss in losses if not math.isfinite(loss)), None)


def _ended_above(losses: list[float]) -> str | None:
    """Medians of the first and the last lines are compared, so that a single bad step says nothing; what their noise
    explains, as of a training that went on from good weights, neither."""
    if len(losses) < 2:
        return None
    window = min(WINDOW, max(1, len(losses) // 5))
    began, ended = median(losses[:window]), median(losses[-window:])
    noise = 0.0
    if len(losses) >= FEW:  # from neighbours, which a trend hardly parts
        noise = TO_SIGMA * median(abs(b - a) for a, b in pairwise(losses)) / math.sqrt(2)
    # The median of n normal values has a standard error of sqrt(pi / 2n); of a difference, twice the variance.
    if ended > began + ABOVE * noise * math.sqrt(math.pi / window):
        return f"its training loss ended at {ended:.4g}, above the {began:.4g} that it began at"
    return None
