"""Intervals of fitted constants by a wild cluster bootstrap: what the fit would have been with other seeds.

The points of one run share its seed, its order of data and its past: they are one cluster, that gets one random weight.
A study has few runs, so
- the weights are Webb's six points (2023, Canadian Journal of Economics 56(3)), not the two of Rademacher, of which few
  clusters make only a few combinations;
- residuals are those of a jackknife, (1 - H_cc)^-1 r_c (CR3; MacKinnon, Nielsen & Webb 2023, arXiv:2205.03288): a fit
  to few runs takes much of each run's noise up, and its plain residuals are too small;
- each draw is scaled by sqrt(nu / chi2_nu), nu = runs - constants that only differences between runs decide, which for
  a linear fit with normal noise makes the draws' percentiles those of Student's t.
Resampling whole runs instead would leave sizes out of a draw, and with them the law.

It holds the law's form for true, and a run's noise for independent of another run's: what all runs share (the held-out
set, the form's error) is in no interval. Measured coverage: tests/stpredict/studies/test_interval_coverage.py.
Torch-free.
"""

from collections.abc import Sequence

import numpy as np

from stpredict.studies.fit import Form, minimise

FEWEST_FREEDOM = 2  # of one, Student's t is 12.7 standard errors at 95 %: more than a law can bend
WEBB = np.array([-np.sqrt(1.5), -1, -np.sqrt(0.5), np.sqrt(0.5), 1, np.sqrt(1.5)])
LARGEST_LEVERAGE = 0.9  # of a run: beyond, its jackknifed residuals would be more than 10 times the plain ones


def scales(draws: int, freedom: int, random: np.random.Generator) -> np.ndarray:
    """(draws,) factors sqrt(nu / chi2_nu)."""
    return np.sqrt(freedom / random.chisquare(freedom, size=draws))


def corrected(form: Form, theta: np.ndarray, log_y: np.ndarray, run: np.ndarray, power: float = 1) -> np.ndarray:
    """The residuals (points,) as (1 - H_cc)^-power r_c: 1, those of a jackknife, and 1/2, those of the right variance
    where all runs have the same (CR2)."""
    fitted, jacobian = (array[0] for array in form.jacobian(theta[None]))
    residuals, inverse = log_y - fitted, np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-12)
    for members in _clusters(run):
        hat = jacobian[members] @ inverse @ jacobian[members].T
        values, vectors = np.linalg.eigh((hat + hat.T) / 2)
        left = np.maximum(1 - values, 1 - LARGEST_LEVERAGE)
        residuals[members] = vectors @ ((vectors.T @ residuals[members]) / left**power)
    return residuals


def copies(
    form: Form, theta: np.ndarray, log_y: np.ndarray, run: np.ndarray, freedom: int, draws: int, seed: int = 0
) -> np.ndarray:
    """(draws, points): what ``log_y`` might have been. ``run``: the run of every point, as integers from 0."""
    random = np.random.default_rng(seed)
    weights = WEBB[random.integers(len(WEBB), size=(draws, run.max() + 1))]
    weights *= scales(draws, freedom, random)[:, None]
    return form.log_loss(theta)[0] + weights[:, run] * corrected(form, theta, log_y, run)


def pooled_copies(
    target: Sequence[np.ndarray], fitted: np.ndarray, pool: Sequence[tuple[np.ndarray, np.ndarray]], freedom: int,
    draws: int, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """(draws, points): ``fitted`` (points) with every run given the residuals of a run drawn from ``pool``, that holds
    the places and residuals of each; the runs' own places are in ``target``, in the order of the points. For laws of
    one size, which has too few runs to tell its noise: taken for alike, in ln L, at every size."""
    random = np.random.default_rng(seed)
    scale = scales(draws, freedom, random)[:, None]
    parts = []
    for places in target:
        table = np.stack([np.interp(places, at, residuals) for at, residuals in pool])
        drawn = random.integers(len(pool), size=draws)
        parts.append(table[drawn] * WEBB[random.integers(len(WEBB), size=(draws, 1))] * scale)
    return fitted + np.concatenate(parts, axis=1)


def refitted(form: Form, theta: np.ndarray, delta: float, noisy: np.ndarray) -> np.ndarray:
    """(draws, constants) of the fits to ``noisy`` (draws, points), each starting from the fit to the data itself."""
    return minimise(form, noisy, theta, delta)


def percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Of the first axis, at the two ends of ``confidence``."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _clusters(run: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(run, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(run[order])) + 1)
