"""Trials whose losses follow L = E + A N^-alpha + B D^-beta, with the noise of seeds: no files, nothing is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stpredict.run import Run, Status
from stpredict.studies.points import TrialPoints
from stpredict.training.scale import Scale

E, A, ALPHA, B, BETA = 1.7, 40.0, 0.3, 300.0, 0.4
TOKENS = 100_000  # of a step
AXES = {"size": "size", "seed": "seed"}


def loss_of(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def sizes(count: int, span: float = 30, least: float = 1e5) -> np.ndarray:
    return np.geomspace(least, least * span, count)


def trial(name: str, n: float, steps: Sequence[float], losses: Sequence[float], **facts) -> TrialPoints:
    at = {"size": f"n{n:.0f}", "seed": "0", **facts.pop("at", {})}
    scale = Scale(
        parameters=round(n), embedding_parameters=round(n / 10), tokens_per_step=TOKENS, flops_per_step=6 * n * TOKENS
    )
    state = Status(kind="prior", state="done", step=int(steps[-1]))
    whole = {"kind": "prior", "status": state, "scale": scale, "learning_rate": 1e-3, "schedule": "constant"}
    whole |= {"metric": "cross_entropy", "steps": [int(step) for step in steps], "losses": [float(x) for x in losses]}
    return TrialPoints(name, at, Run(Path(name)), **{**whole, **facts})


def study(
    n: Sequence[float],
    seeds: int = 2,
    noise: float = 0.003,
    steps: Sequence[int] = (2000,),
    random: int = 0,
    law: Callable = loss_of,
    **facts,
) -> list[TrialPoints]:
    """One trial for each size and seed; ``noise``: of a run as a whole, in ln L; its single points' is a third."""
    draw = np.random.default_rng(random)
    steps = np.asarray(steps)
    trials = []
    for size in n:
        for seed in range(seeds):
            shift = noise * (draw.standard_normal() + draw.standard_normal(len(steps)) / 3)
            losses = law(round(size), steps * TOKENS) * np.exp(shift)
            trials.append(trial(f"n{size:.0f}-{seed}", size, steps, losses, at={"seed": str(seed)}, **facts))
    return trials


CURVE = np.unique(np.geomspace(20, 2000, 30).astype(int))
