"""y = k x^p by least squares in logarithms: lr*(N), N_opt(C), D_opt(C). Torch-free."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from stpredict.studies.analysis import CurvePoint, Estimate, Law, LawName
from stpredict.studies.bootstrap import percentiles
from stpredict.studies.config import AnalysisConfig

POWERS = {"lr(N)": "p", "N_opt(C)": "a", "D_opt(C)": "b"}
FORMS = {"lr(N)": "lr = k N^p", "N_opt(C)": "N_opt = k C^a", "D_opt(C)": "D_opt = k C^b"}
PLACES = 100


def fit_power_law(
    name: LawName,
    x: np.ndarray,
    y: np.ndarray,
    analysis: AnalysisConfig,
    *,
    of: str,
    source: str,
    draws: np.ndarray | None = None,
    how: str = "",
    reach: Sequence[float] = (),
) -> Law:
    """``draws`` (draws, points): other values that y might have had, made as ``how`` says. None: the points are taken
    for independent of each other and the interval is Student's, which needs more than two; or, where there is ``how``
    without draws, there is none, for that reason."""
    design = np.stack([np.ones(len(x)), np.log(x)], axis=1)
    middle = design[:, 1].mean()
    design[:, 1] -= middle
    inverse = np.linalg.inv(design.T @ design)
    theta = inverse @ design.T @ np.log(y)
    free = len(x) - 2
    scatter = float(np.sqrt(((np.log(y) - design @ theta) ** 2).sum() / free)) if free else None
    ends = np.log([x.min(), x.max(), *reach])
    log_x = np.linspace(ends.min(), ends.max(), PLACES)
    at = {
        "k": np.array([1, -middle]),
        POWERS[name]: np.array([0, 1]),
        **{place: np.array([1, place - middle]) for place in log_x},
    }
    if draws is not None:
        thetas = np.log(draws) @ design @ inverse
        intervals = {key: percentiles(thetas @ row, analysis.confidence) for key, row in at.items()}
    elif free and not how:
        t = stdtrit(free, (1 + analysis.confidence) / 2)
        half = {key: t * scatter * np.sqrt(row @ inverse @ row) for key, row in at.items()}
        intervals = {key: (row @ theta - half[key], row @ theta + half[key]) for key, row in at.items()}
        how = f"Student's t, {free} degrees of freedom, the points taken for independent"
    else:
        intervals, how = {}, f"none: {how or 'two constants go through two points'}"

    def estimate(key, shape=lambda value: value) -> Estimate:
        low, high = intervals.get(key, (None, None))
        ends = {} if low is None else {"low": float(shape(low)), "high": float(shape(high))}
        return Estimate(value=float(shape(at[key] @ theta)), **ends)

    return Law(
        name=name,
        of=of,
        form=FORMS[name],
        source=source,
        constants={"k": estimate("k", np.exp), POWERS[name]: estimate(POWERS[name])},
        points=[],
        others=len(x),
        curve=[
            CurvePoint(
                x=float(np.exp(place)),
                fitted=estimate(place, np.exp),
                extrapolation=bool(not np.log(x.min()) - 1e-9 <= place <= np.log(x.max()) + 1e-9),
            )
            for place in log_x
        ],
        scatter=scatter,
        interval=how if how.startswith("none") else f"{100 * analysis.confidence:g}%; {how}",
    )
