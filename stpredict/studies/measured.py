"""From the trials of a study to the points that laws are fitted to: who takes part, and with which of its validations.
Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stpredict.studies.analysis import LeftOut
from stpredict.studies.config import AnalysisConfig, Role
from stpredict.studies.points import TrialPoints

MOST_POINTS = 4000  # of a law: curves are thinned until about so many are left,
CURVE_POINTS = (4, 12)  # but to no fewer, and no more, of a run: neighbours on a curve say the same


@dataclass(frozen=True, eq=False)
class Measured:
    """One run: the steps and losses of its validations after warm-up, and what turns steps into tokens and FLOPs.

    ``size``, ``data``: its labels on the axes of these roles; ``n``: parameters, as the analysis counts them.
    """

    name: str
    size: str
    data: str
    n: float
    tokens_per_step: float
    flops_per_step: float | None
    lr: float | None
    steps: np.ndarray
    losses: np.ndarray
    epochs: float | None
    ends_in_warmup: bool

    @property
    def loss(self) -> float:
        return float(self.losses[-1])

    @property
    def tokens(self) -> float:
        return float(self.steps[-1] * self.tokens_per_step)

    @property
    def flops(self) -> float | None:
        return None if self.flops_per_step is None else float(self.steps[-1] * self.flops_per_step)

    def log_loss_at(self, tokens: float | np.ndarray) -> np.ndarray:
        """ln L at a number of tokens between validations, linear in ln D; NaN outside."""
        known = np.log(self.steps * self.tokens_per_step)
        places = np.clip(np.log(tokens), known[0] - 1e-9, known[-1] + 1e-9)
        values = np.interp(places, known, np.log(self.losses))
        return np.where(np.abs(places - np.log(tokens)) < 1e-9, values, np.nan)

    def thinned(self, most: int, start: float) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses of at most ``most`` validations from the share ``start`` of the steps on, about evenly
        spaced in ln step; the last is one."""
        first = np.searchsorted(self.steps, start * self.steps[-1])
        steps, losses = self.steps[first:], self.losses[first:]
        wanted = np.geomspace(steps[0], steps[-1], most)
        chosen = np.unique(np.abs(steps[:, None] - wanted).argmin(axis=0))
        return steps[chosen], losses[chosen]


@dataclass
class Samples:
    """Points of a law, each array (points,). ``run`` numbers the runs from 0; ``names`` says who they are."""

    n: np.ndarray
    d: np.ndarray
    c: np.ndarray  # NaN where FLOPs are not known
    loss: np.ndarray
    run: np.ndarray
    names: list[tuple[str, ...]]  # of every point
    sizes: list[str]  # of every point

    @property
    def runs(self) -> int:
        return int(self.run.max()) + 1


def by_size(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """From the smallest to the largest."""
    sizes: dict[str, list[Measured]] = {}
    for run in sorted(runs, key=lambda run: run.n):
        sizes.setdefault(run.size, []).append(run)
    return sizes


def final_points(runs: Sequence[Measured]) -> Samples:
    return _samples([(run, run.steps[-1:], run.losses[-1:]) for run in runs])


def curve_points(runs: Sequence[Measured], start: float) -> Samples:
    most = int(np.clip(MOST_POINTS // len(runs), *CURVE_POINTS))
    return _samples([(run, *run.thinned(most, start)) for run in runs])


def points_at(runs: Sequence[Measured], tokens: float) -> Samples:
    """Of every run that came so far, its loss there."""
    rows = [(run, float(run.log_loss_at(tokens))) for run in runs]
    return _samples(
        [(run, np.array([tokens / run.tokens_per_step]), np.exp([loss])) for run, loss in rows if np.isfinite(loss)]
    )


def _samples(rows: Sequence[tuple[Measured, np.ndarray, np.ndarray]]) -> Samples:
    counts = [len(steps) for _, steps, _ in rows]
    return Samples(
        n=np.repeat([run.n for run, *_ in rows], counts).astype(float),
        d=np.concatenate([steps * run.tokens_per_step for run, steps, _ in rows]),
        c=np.concatenate([steps * (run.flops_per_step or np.nan) for run, steps, _ in rows]),
        loss=np.concatenate([losses for *_, losses in rows]),
        run=np.repeat(np.arange(len(rows)), counts),
        names=[(run.name,) for run, steps, _ in rows for _ in steps],
        sizes=[run.size for run, steps, _ in rows for _ in steps],
    )


def measured(trial: TrialPoints, axes: Mapping[str, Role], analysis: AnalysisConfig) -> Measured | LeftOut:
    """The trial as a law may use it, or why none may."""
    if why := _why_not(trial):
        return LeftOut(trial=trial.name, why=why)
    scale, n = trial.scale, _counted(trial, analysis)
    last = dict(zip(trial.steps, trial.losses, strict=True))  # of steps done twice, the later counts
    steps, losses = np.array(sorted(last.items()), dtype=float).T
    warm = steps > min(trial.warmup_steps, steps[-1] - 1)
    size, data = _place(trial, axes, n)
    return Measured(
        name=trial.name,
        size=size,
        data=data,
        n=n,
        tokens_per_step=scale.tokens_per_step,
        flops_per_step=scale.flops_per_step,
        lr=trial.learning_rate,
        steps=steps[warm],
        losses=losses[warm],
        epochs=trial.epochs,
        ends_in_warmup=bool(trial.warmup_steps >= steps[-1]),
    )


def diverged(
    trials: Sequence[TrialPoints], axes: Mapping[str, Role], analysis: AnalysisConfig
) -> list[tuple[str, str, float]]:
    """Size, data and learning rate of those that diverged."""
    return [
        (*_place(trial, axes, _counted(trial, analysis)), trial.learning_rate)
        for trial in trials
        if trial.diverged and trial.scale and trial.learning_rate is not None
    ]


def _counted(trial: TrialPoints, analysis: AnalysisConfig) -> int:
    """N"""
    scale = trial.scale
    return scale.parameters - (scale.embedding_parameters if analysis.parameters == "without_embeddings" else 0)


def _place(trial: TrialPoints, axes: Mapping[str, Role], n: int) -> tuple[str, str]:
    """Its labels on the axes of role size and data."""
    size, data = (
        ", ".join(trial.at[axis] for axis, role in axes.items() if role == wanted) for wanted in ("size", "data")
    )
    return size or f"{n:,} parameters", data


def _why_not(trial: TrialPoints) -> str | None:
    if trial.diverged:
        return f"diverged: {trial.diverged}"
    if trial.status is None:
        return "; ".join(["not begun", *trial.problems])
    if not trial.done:
        return f"not finished: {trial.status.state}, at step {trial.status.step}"
    if trial.scale is None:
        return "its size is not known: there is no scale.json in its run; training on writes it"
    if not trial.steps:
        return f"it has no validation with {trial.metric}"
    if not trial.tokens:
        return f"no tokens are counted up to its last validation, at step {trial.steps[-1]}"
    if min(trial.losses) <= 0:
        return f"its {trial.metric} is not above zero, and laws are fitted to its logarithm"
    return None
