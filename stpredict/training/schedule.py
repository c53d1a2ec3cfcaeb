"""Schedules of the learning rate and of Adam's first beta, as functions of the step alone: resuming needs no state."""

import math

from torch.optim import Optimizer

from stpredict.training.config import OptimizerConfig, ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at optimizer step ``step`` (from 0) of ``steps``.

    Warm-up rises linearly and reaches 1 at step ``warmup``; then ``kind`` falls to ``final`` at the last step.
    ``one_cycle`` has a rise of its own: torch.optim.lr_scheduler.OneCycleLR's, with two phases and cosines.
    """
    if config.kind == "one_cycle":
        cycle = config.one_cycle
        first = 1 / cycle.div_factor
        return _cycled(cycle.pct_start, step, steps, first, 1.0, first / cycle.final_div_factor)
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
            return _cosine(1.0, config.final, done)


def first_beta(config: ScheduleConfig, step: int, steps: int, otherwise: float) -> float:
    """Adam's first beta at ``step``: ``one_cycle`` lowers it while the learning rate rises, and raises it again; else
    it is ``otherwise``."""
    if config.kind != "one_cycle" or not config.one_cycle.cycle_momentum:
        return otherwise
    cycle = config.one_cycle
    return _cycled(cycle.pct_start, step, steps, cycle.max_momentum, cycle.base_momentum, cycle.max_momentum)


def apply_schedule(optimizer: Optimizer, settings: OptimizerConfig, schedule: ScheduleConfig, step: int, steps: int):
    """Sets learning rate and first beta of every group of ``optimizer`` for optimizer step ``step`` (from 0)."""
    lr = settings.lr * learning_rate_factor(schedule, step, steps)
    beta = first_beta(schedule, step, steps, settings.betas[0])
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:  # SGD has none
            group["betas"] = (beta, settings.betas[1])


def _cycled(pct_start: float, step: int, steps: int, first: float, middle: float, last: float) -> float:
    """``first`` to ``middle`` over ``pct_start`` of the steps, then to ``last`` at the last step."""
    turn, end = pct_start * steps - 1, steps - 1
    if step <= turn:
        return _cosine(first, middle, step / turn) if turn else middle
    # Where the rise takes less than a step (turn < 0) OneCycleLR counts the fall from that negative step; so here.
    return _cosine(middle, last, (step - turn) / (end - turn)) if end > turn else last


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
