"""Fits sums of power laws, L = E + A N^-alpha + B D^-beta and its parts, to many noisy copies of the data at once.

Approach 3 of Hoffmann et al. (arXiv:2203.15556, appendix D.3): the Huber loss of ln L, whose terms are written as
exponentials so that the law is a log-sum-exp, minimised from several starts. Besiroglu et al. (arXiv:2404.10102) found
that averaging the Huber loss over the points, instead of summing it, let L-BFGS stop early; here a Levenberg-Marquardt
iteration on the sum goes on until a step gains less than 1e-8 of it. Every copy is its own problem;
numpy does all in one pass. Torch-free.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

#: Hoffmann et al.'s delta. Below a study's noise it would be least absolute deviations, which of few points fits as
#: many exactly as there are constants: so it is ROBUST standard deviations of the residuals where those are more.
HUBER_DELTA = 1e-3
ROBUST = 1.345  # 95 % of the efficiency of least squares under normal noise (Huber 1964)
EXPONENTS = (0.01, 3.0)
NEGLIGIBLE = 15.0  # a term of e^-15 times the loss is none
STARTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3)
CONVERGED = 1e-8  # share of the loss that a step still gains
NUMBERS = 2**18  # copies x points x constants that are computed at once


@dataclass
class Form:
    """The points' abscissae, (terms, points) of ln x. The constants of a fit are theta = (ln E, ln(A x0^-p), p, ...),
    x0 being ``centre``, the middle of the points."""

    log_x: np.ndarray

    def __post_init__(self) -> None:
        self.log_x = np.atleast_2d(self.log_x)
        self.centre = (self.log_x.min(axis=1) + self.log_x.max(axis=1)) / 2
        self.u = self.log_x - self.centre[:, None]
        self.terms = len(self.log_x)
        self.constants = 1 + 2 * self.terms

    def terms_at(self, theta: np.ndarray, u: np.ndarray) -> np.ndarray:
        """ln of every term, (copies, 1 + terms, points)."""
        parts = [theta[:, 0, None] + 0 * u[:1]]
        for k in range(self.terms):
            a, p = theta[:, 2 * k + 1, None], theta[:, 2 * k + 2, None]
            parts.append(a - p * u[k])
        return np.stack(parts, axis=1)

    def log_loss(self, theta: np.ndarray, log_x: np.ndarray | None = None) -> np.ndarray:
        """ln L, (copies, points), at the points or at ``log_x`` (terms, places)."""
        u = self.u if log_x is None else np.atleast_2d(log_x) - self.centre[:, None]
        return np.logaddexp.reduce(self.terms_at(np.atleast_2d(theta), u), axis=1)

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln L, (copies, points), and its derivatives, (copies, points, constants)."""
        logs = self.terms_at(theta, self.u)
        y = np.logaddexp.reduce(logs, axis=1)
        shares = np.exp(logs - y[:, None])
        columns = [shares[:, 0]]
        for k in range(self.terms):
            share = shares[:, 1 + k]
            columns += [share, -share * self.u[k]]
        return y, np.stack(columns, axis=-1)

    def floor(self, theta: np.ndarray) -> np.ndarray:
        return np.exp(theta[..., 0])

    def term(self, theta: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A and alpha of A x^-alpha, in the units of x."""
        a, p = theta[..., 2 * k + 1], theta[..., 2 * k + 2]
        return np.exp(a + p * self.centre[k]), p

    def bounds(self, log_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A term is at least e^-15 of the least loss, and no more, where the points are, than 100 times the most."""
        low, high = np.empty(self.constants), np.empty(self.constants)
        low[:], high[:] = log_y.min() - NEGLIGIBLE, log_y.max() + np.log(100)
        low[2::2], high[2::2] = EXPONENTS
        return low, high


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """Sum over the last axis."""
    r = np.abs(residuals)
    return np.where(r <= delta, r * r / 2, delta * (r - delta / 2)).sum(axis=-1)


def fit(form: Form, log_y: np.ndarray) -> tuple[np.ndarray, float]:
    """The best theta from several starts for ``log_y`` (points), and the Huber delta it was fitted with."""
    starts = _starts(form, log_y)
    copies = np.broadcast_to(log_y, (len(starts), len(log_y)))
    theta = minimise(form, copies, starts, np.inf)
    best = _least(form, log_y, theta, np.inf)
    free = len(log_y) - form.constants
    delta = HUBER_DELTA
    for _ in range(3 if free > 0 else 0):  # the scale follows from the fit, and the fit from the scale
        residuals = log_y - form.log_loss(best)[0]
        weights = np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300)) if delta > HUBER_DELTA else 1
        delta = max(HUBER_DELTA, ROBUST * float(np.sqrt((weights * residuals**2).sum() / free)))
        theta = minimise(form, copies, theta, delta)
        best = _least(form, log_y, theta, delta)
    return best, delta


def _least(form: Form, log_y: np.ndarray, theta: np.ndarray, delta: float) -> np.ndarray:
    return theta[np.argmin(huber(log_y - form.log_loss(theta), delta))]


def _starts(form: Form, log_y: np.ndarray) -> np.ndarray:
    """For every choice of exponents the best other constants, none negative (linear least squares of L / measured)."""
    starts = []
    low, high = form.bounds(log_y)
    for exponents in np.stack(np.meshgrid(*[STARTS] * form.terms), axis=-1).reshape(-1, form.terms):
        columns = [np.ones(form.u.shape[1]), *np.exp(-exponents[:, None] * form.u)]
        coefficients, _ = nnls(np.stack(columns, axis=1) * np.exp(-log_y)[:, None], np.ones(len(log_y)))
        logs = np.log(np.maximum(coefficients, np.exp(log_y.min() - 6)))
        theta = [logs[0]]
        for a, p in zip(logs[1:], exponents, strict=True):
            theta += [a, p]
        starts.append(np.clip(theta, low, high))
    return np.stack(starts)


def minimise(form: Form, log_y: np.ndarray, start: np.ndarray, delta: float, steps: int = 200) -> np.ndarray:
    """theta (copies, constants) of least Huber loss for each of ``log_y`` (copies, points), each from its ``start``.

    Levenberg-Marquardt on iteratively reweighted squares, within Form.bounds: constants at a bound that the gradient
    pushes against rest there.
    """
    theta = np.array(np.broadcast_to(start, (len(log_y), form.constants)), dtype=float)
    at_once = max(16, NUMBERS // (log_y.shape[1] * form.constants))
    for first in range(0, len(log_y), at_once):
        part = slice(first, first + at_once)
        theta[part] = _minimise(form, log_y[part], theta[part], delta, steps)
    return theta


def _minimise(form: Form, log_y: np.ndarray, theta: np.ndarray, delta: float, steps: int) -> np.ndarray:
    low, high = form.bounds(log_y)
    theta = np.clip(theta, low, high)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    loss = huber(log_y - form.log_loss(theta), delta)
    for _ in range(steps):
        now, data = theta[active], log_y[active]
        fitted, jacobian = form.jacobian(now)
        residuals = data - fitted
        weights = np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[..., None]
        gradient = np.einsum("bnp,bn->bp", weighted, residuals)
        hessian = np.einsum("bnp,bnq->bpq", weighted, jacobian)
        resting = ((now <= low) & (gradient < 0)) | ((now >= high) & (gradient > 0))
        gradient[resting] = 0
        hessian *= ~resting[:, :, None] & ~resting[:, None, :]
        scale = np.einsum("bpp->bp", hessian)
        floor = 1e-12 * scale.max(axis=1, keepdims=True) + 1e-30
        damped = hessian + np.einsum("bp,pq->bpq", damping[active, None] * scale + floor, np.eye(form.constants))
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        there = np.clip(now + step, low, high)
        new = huber(data - form.log_loss(there), delta)
        gain = loss[active] - new
        better = gain > 0
        flat = better & (gain < CONVERGED * new)
        moved = np.abs(there - now).max(axis=1)
        theta[active[better]], loss[active[better]] = there[better], new[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 4)
        active = active[(moved > 1e-9) & ~flat & (damping[active] < 1e12)]
        if not len(active):
            break
    return theta
