"""The optimum that a joint law implies: N_opt = k C^a and D_opt = k' C^b (Hoffmann et al., arXiv:2203.15556, eq. 4).

Theirs holds for C = 6 N D. Here FLOPs are counted, and FLOPs per token = q N^g, fitted over the sizes (g below 1 where
a part of the parameters is look-up tables, or attention is much of the work). Setting the derivative of
A N^-alpha + B D^-beta along C = q N^g D to zero gives

    N_opt = G (C / q)^a',   a' = beta / (alpha + g beta),   G = (alpha A / (g beta B))^(1 / (alpha + g beta))
    D_opt = G^-g (C / q)^b, b  = alpha / (alpha + g beta)

which for g = 1 are theirs. Torch-free.
"""

from collections.abc import Sequence

import numpy as np

from stpredict.studies.analysis import CurvePoint, Law, NotFitted
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.law import Fitted, estimate
from stpredict.studies.measured import Measured, by_size

PLACES = 100


def flops_per_token(runs: Sequence[Measured]) -> tuple[float, float]:
    """q and g of q N^g, by least squares in logarithms over the sizes."""
    sizes = [members[0] for members in by_size(runs).values()]
    n = np.log([run.n for run in sizes])
    g, log_q = np.polyfit(n, np.log([run.flops_per_step / run.tokens_per_step for run in sizes]), 1)
    return float(np.exp(log_q)), float(g)


def optimum_of(joint: Fitted | NotFitted, runs: Sequence[Measured], analysis: AnalysisConfig) -> list[Law | NotFitted]:
    """N_opt(C) and D_opt(C), over the C of the runs and, where there are predictions, those of their optimum. An
    extrapolation is also an optimum of more parameters or tokens, or fewer, than the law was fitted to."""
    names = ("N_opt(C)", "D_opt(C)")
    if isinstance(joint, NotFitted):
        return [NotFitted(name=name, of="joint law", why="there is no joint law") for name in names]
    if any(run.flops_per_step is None for run in runs):
        why = "the models' FLOPs could not be counted"
        return [NotFitted(name=name, of="joint law", why=why) for name in names]
    q, g = flops_per_token(runs)
    centre = float(np.log(max(run.flops for run in runs)))
    values = {name: joint.values(name) for name in ("A", "alpha", "B", "beta")}
    fit = _optimum(*[value for value, _ in values.values()], q, g)
    draws = None if joint.thetas is None else _optimum(*[drawn for _, drawn in values.values()], q, g)
    first = float(np.log(min(run.flops_per_step * run.steps[0] for run in runs)))
    reach = [float((np.log(n) - fit[0]) / fit[1]) for n in analysis.predict]
    log_c = np.linspace(min(first, *reach, centre), max(centre, *reach, first), PLACES)
    outside = (log_c < first - 1e-9) | (log_c > centre + 1e-9)
    for (log_k, exponent), what in ((fit[:2], "parameters"), (fit[2:], "tokens")):
        fitted_to = np.log([getattr(point, what) for point in joint.law.points])
        optimum = log_k + exponent * log_c
        outside |= (optimum < fitted_to.min() - 1e-9) | (optimum > fitted_to.max() + 1e-9)
    source = f"follows from L(N, D) and FLOPs per token = {q:.3g} N^{g:.3f}"
    laws = []
    for i, (name, power, form) in enumerate([("N_opt(C)", "a", "N_opt = k C^a"), ("D_opt(C)", "b", "D_opt = k C^b")]):
        log_k, exponent = fit[2 * i : 2 * i + 2]
        drawn_k, drawn = (None, None) if draws is None else draws[2 * i : 2 * i + 2]
        curve = []
        for place, out in zip(log_c, outside, strict=True):
            drawn_y = None if drawn is None else np.exp(drawn_k + drawn * place)
            fitted = estimate(np.exp(log_k + exponent * place), drawn_y, analysis)
            curve.append(CurvePoint(x=float(np.exp(place)), fitted=fitted, extrapolation=bool(out)))
        laws.append(
            Law(
                name=name,
                of="joint law",
                form=form,
                source=source,
                constants={
                    "k": estimate(np.exp(log_k), None if drawn is None else np.exp(drawn_k), analysis),
                    power: estimate(exponent, drawn, analysis),
                },
                points=[],
                curve=curve,
                interval=joint.law.interval,
            )
        )
    return laws


def _optimum(a, alpha, b, beta, q: float, g: float):
    """ln k and exponent of N_opt, and of D_opt; of numbers or of arrays of draws."""
    both = alpha + g * beta
    log_g = np.log(alpha * a / (g * beta * b)) / both
    n_power, d_power = beta / both, alpha / both
    return log_g - n_power * np.log(q), n_power, -g * log_g - d_power * np.log(q), d_power
