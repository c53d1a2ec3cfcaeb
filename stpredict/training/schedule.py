"""Learning-rate schedules as functions of the step alone, so that resuming needs no state."""

import math

from stpredict.training.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at optimizer step ``step`` (from 0) of ``steps``.

    Warm-up rises linearly and reaches 1 at step ``warmup``; then ``kind`` falls to ``final`` at the last step.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else round((config.warmup_ratio or 0) * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    match config.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1 + (config.final - 1) * done
        case "cosine":
            return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
