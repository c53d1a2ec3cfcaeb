"""What an analysis of a study's trials contains, as it is written to analysis.json and drawn. Torch-free.

N: parameters, D: tokens (tokens per step x steps), C: FLOPs (as counted, FLOPs per step x steps), L: the validation's
metric. Every number is finite; what is not known is None.
"""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

LawName = Literal["L(N)", "L(D)", "L(C)", "L(N, D)", "N_opt(C)", "D_opt(C)", "lr(N)"]


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Result):
    """``low`` and ``high`` are the interval's ends at the analysis' confidence; None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


class Point(Result):
    """A measured point and what the law says there. ``residual``: ln(measured / fitted). ``trials``: those whose mean
    it is, or the one that it was read from."""

    trials: tuple[str, ...]
    size: str
    parameters: float
    tokens: float
    flops: float | None
    measured: float
    fitted: float
    residual: float


class CurvePoint(Result):
    """A point of a fitted law for drawing; ``extrapolation`` where x is outside what was fitted."""

    x: float
    fitted: Estimate
    extrapolation: bool


class Law(Result):
    """A fitted law.

    - ``of`` says what it is the law of where there are several of one name: D of an L(N), size of an L(D), "parabolas"
      or "envelope" or "joint law" of N_opt(C) and D_opt(C); "" otherwise
    - ``form``: L = E + A N^-alpha; ``constants``: name → estimate, in that form's names
    - ``points``: what it was fitted to; ``source``: where those come from, in words
    - ``others``: how many it was fitted to that are no losses (the best rates of sizes, minima of parabolas); else None
    - ``curve``: the law over its x (N, D or C), at 100 log-spaced places; of L(N, D) empty (its terms are in constants)
    - ``scatter``: the residuals' standard deviation (of ln L); None without degrees of freedom
    - ``interval``: how the intervals were made, or why there are none
    """

    name: LawName
    of: str = ""
    form: str
    source: str
    constants: dict[str, Estimate]
    points: list[Point]
    others: int | None = None
    curve: list[CurvePoint] = []
    scatter: float | None = None
    interval: str
    warnings: list[str] = []

    def at(self, parameters: float | None = None, tokens: float | None = None, flops: float | None = None) -> float:
        """The law's value. L(N) and lr(N) need ``parameters``, L(D) ``tokens``, those of C ``flops``."""
        constants = {name: estimate.value for name, estimate in self.constants.items()}
        match self.name:
            case "L(N, D)":
                terms = ("A", "alpha", parameters), ("B", "beta", tokens)
            case "L(N)":
                terms = (("A", "alpha", parameters),)
            case "L(D)":
                terms = (("B", "beta", tokens),)
            case "L(C)":
                terms = (("K", "gamma", flops),)
            case "N_opt(C)" | "D_opt(C)":
                return constants["k"] * flops ** constants["a" if self.name == "N_opt(C)" else "b"]
            case "lr(N)":
                return constants["k"] * parameters ** constants["p"]
        return constants.get("E", 0.0) + sum(constants[k] * x ** -constants[power] for k, power, x in terms)


class NotFitted(Result):
    """A law that was not fitted, and why, in words."""

    name: LawName
    of: str = ""
    why: str


class UsedTrial(Result):
    """A trial that takes part. ``best_lr``: whether its learning rate is the best of its size; only then is it part of
    the laws."""

    trial: str
    size: str
    parameters: float
    tokens: float
    flops: float | None
    learning_rate: float | None
    loss: float
    best_lr: bool
    points: int


class LeftOut(Result):
    trial: str
    why: str


class LearningRate(Result):
    """Mean and standard deviation (None of one) of the final losses of the ``seeds`` runs at this learning rate."""

    learning_rate: float
    loss: float
    spread: float | None
    seeds: int


class BestLearningRate(Result):
    """``best`` is the grid's; ``vertex`` that of a parabola in ln lr through the best and its neighbours, None where
    the best is at an edge of the grid or there are fewer than three. ``at_edge``: a better one may lie beyond; not so
    where the next larger rate was tried and every run diverged, ``diverges_at``."""

    size: str
    of: str = ""
    parameters: float
    tried: list[LearningRate]
    best: float
    vertex: float | None
    at_edge: bool
    diverges_at: float | None = None


class FrontierPoint(Result):
    """The loss at C of the size that is best there. ``edge``: the smallest or the largest of the sizes that have a
    point at this C wins, so the optimum may lie beyond it."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    size: str
    edge: bool


class SlicePoint(Result):
    """The mean loss of a size's runs at the slice's C."""

    size: str
    parameters: float
    tokens: float
    loss: float


class IsoFlop(Result):
    """Losses of the sizes at one C, and the parabola in ln N through those around the least:
    loss = ``parabola[0]`` + ``parabola[1]`` u + ``parabola[2]`` u², u = ln N. ``optimum`` is its vertex; None where
    ``why_not`` says why."""

    flops: float
    source: Literal["final", "curve"]
    points: list[SlicePoint]
    parabola: tuple[float, float, float] | None
    optimum: SlicePoint | None
    why_not: str | None = None


class Prediction(Result):
    """The loss that the law ``law`` (name and ``of``) gives for a model of ``parameters``, trained on ``tokens``.

    ``factor``: how many times the largest size that was fitted it is; ``extrapolation``: whether that, or tokens, is
    beyond what was fitted."""

    law: LawName
    of: str = ""
    parameters: float
    tokens: float
    loss: Estimate
    extrapolation: bool
    factor: float
    token_factor: float
    warnings: list[str] = []


class Group(Result):
    """The trials that agree on every axis to compare: ``at`` is their place on those (empty where there is none)."""

    at: dict[str, str]
    used: list[UsedTrial]
    left_out: list[LeftOut]
    learning_rates: list[BestLearningRate]
    laws: list[Law]
    not_fitted: list[NotFitted]
    frontier: list[FrontierPoint]
    iso_flops: list[IsoFlop]
    predictions: list[Prediction]
    warnings: list[str]

    @property
    def title(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.at.items())

    def find(self, name: LawName) -> Sequence[Law]:
        return [law for law in self.laws if law.name == name]


class Analysis(Result):
    """``points``: final or curve, what was really used; ``counted``: what N counts; ``draws``: of the bootstrap."""

    metric: str | None
    points: Literal["final", "curve"]
    counted: Literal["all", "without_embeddings"]
    confidence: float
    draws: int
    groups: list[Group]
    warnings: list[str]


def finite(value: float) -> float | None:
    """None for what JSON has no word for."""
    return float(value) if math.isfinite(value) else None
