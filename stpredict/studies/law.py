"""One law of losses, fitted to points with intervals: its constants, its curve, and what there is to doubt. Torch-free.

Which points each law is fitted to is in laws.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stpredict.studies import bootstrap
from stpredict.studies.analysis import CurvePoint, Estimate, Law, LawName, NotFitted, Point
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.fit import EXPONENTS, NEGLIGIBLE, Form, fit
from stpredict.studies.measured import Samples

# Name → its terms beside E: (constant, exponent, array of Samples)
TERMS = {
    "L(N)": (("A", "alpha", "n"),),
    "L(D)": (("B", "beta", "d"),),
    "L(C)": (("K", "gamma", "c"),),
    "L(N, D)": (("A", "alpha", "n"), ("B", "beta", "d")),
}
FORMS = {
    "L(N)": "L = E + A N^-alpha",
    "L(D)": "L = E + B D^-beta",
    "L(C)": "L = E + K C^-gamma",
    "L(N, D)": "L = E + A N^-alpha + B D^-beta",
}
CURVE_PLACES = 100
EARLY = 2.0  # times the residuals' root mean square, that the mean of the first points of curves may lie off
UNIDENTIFIED = 0.05  # of the draws: where in more the floor is nothing, the data do not say that there is one


@dataclass
class Fitted:
    """A law, and the fit behind it; ``thetas``: of the bootstrap's draws, None where there is no interval."""

    law: Law
    form: Form
    theta: np.ndarray
    thetas: np.ndarray | None

    def estimate(self, analysis: AnalysisConfig, *log_x: float) -> Estimate:
        """The law's value at ln x of each of its terms."""
        return _estimates(self.form, self.theta, self.thetas, np.array(log_x)[:, None], analysis)[0]

    def values(self, name: str) -> tuple[float, np.ndarray | None]:
        """Of a constant: the fit's, and every draw's."""
        value = dict(_constants(self.law.name, self.form, self.theta[None]))[name][0]
        draws = None if self.thetas is None else dict(_constants(self.law.name, self.form, self.thetas))[name]
        return value, draws


@dataclass
class Noise:
    """How other seeds would differ. ``freedom``: of the noise between runs, for the wild cluster bootstrap; or
    ``copies`` (draws, points) of ln L, made as ``how`` says. With neither there is no interval, because of ``none``."""

    freedom: int | None = None
    copies: np.ndarray | None = None
    how: str = ""
    none: str = ""

    def drawn(self, form: Form, theta: np.ndarray, samples: Samples, draws: int) -> tuple[np.ndarray | None, str]:
        """The copies, and how they were made; None, and why there are none."""
        if self.copies is not None:
            return self.copies, self.how
        if not draws:
            return None, "bootstrap is 0"
        if self.freedom is None:
            return None, self.none
        if self.freedom < bootstrap.FEWEST_FREEDOM:
            left = f"{samples.runs} runs leave {max(self.freedom, 0)} degrees of freedom"
            return None, f"{left}; an interval takes two or more"
        copies = bootstrap.copies(form, theta, np.log(samples.loss), samples.run, self.freedom, draws)
        return copies, f"wild cluster bootstrap of {samples.runs} runs, {self.freedom} degrees of freedom"


def fit_law(
    name: LawName,
    samples: Samples,
    analysis: AnalysisConfig,
    noise: Noise,
    *,
    source: str,
    of: str = "",
    reach: Sequence[float] = (),
) -> Fitted | NotFitted:
    """``source``: of the points, in words; ``of``: what it is the law of. The curve reaches to ``reach``."""
    log_x = np.log([getattr(samples, array) for *_, array in TERMS[name]])
    form, log_y = Form(log_x), np.log(samples.loss)
    theta, delta = fit(form, log_y)
    for (_, exponent, _), k in zip(TERMS[name], range(form.terms), strict=True):
        if why := _at_bound(exponent, form.term(theta, k)[1]):
            return NotFitted(name=name, of=of, why=why)
    copies, how = noise.drawn(form, theta, samples, analysis.bootstrap)
    thetas = None if copies is None else bootstrap.refitted(form, theta, delta, copies)
    interval = (
        f"none: {how}" if thetas is None else f"{100 * analysis.confidence:g}%; {how}; {analysis.bootstrap} draws"
    )
    residuals = log_y - form.log_loss(theta)[0]
    free = len(log_y) - form.constants
    law = Law(
        name=name,
        of=of,
        form=FORMS[name],
        source=source,
        constants=_as_estimates(name, form, theta, thetas, analysis),
        points=points_of(samples, form.log_loss(theta)[0]),
        curve=_curve(form, theta, thetas, reach, analysis) if form.terms == 1 else [],
        scatter=float(np.sqrt((residuals**2).sum() / free)) if free > 0 else None,
        interval=interval,
        warnings=[*_doubts(name, form, theta, thetas, log_y), *_early(samples, residuals)],
    )
    return Fitted(law, form, theta, thetas)


def points_of(samples: Samples, log_fitted: np.ndarray) -> list[Point]:
    rows = zip(
        samples.names, samples.sizes, samples.n, samples.d, samples.c, samples.loss, log_fitted.tolist(), strict=True
    )
    return [
        Point(
            trials=names,
            size=size,
            parameters=n,
            tokens=d,
            flops=None if np.isnan(c) else c,
            measured=loss,
            fitted=float(np.exp(fitted)),
            residual=float(np.log(loss) - fitted),
        )
        for names, size, n, d, c, loss, fitted in rows
    ]


def _constants(name: LawName, form: Form, theta: np.ndarray) -> list[tuple[str, np.ndarray]]:
    found = [("E", form.floor(theta))]
    for k, (constant, exponent, _) in enumerate(TERMS[name]):
        found += zip((constant, exponent), form.term(theta, k), strict=True)
    return found


def _as_estimates(
    name: LawName, form: Form, theta: np.ndarray, thetas: np.ndarray | None, analysis: AnalysisConfig
) -> dict[str, Estimate]:
    values = {constant: float(value[0]) for constant, value in _constants(name, form, theta[None])}
    if thetas is None:
        return {constant: Estimate(value=value) for constant, value in values.items()}
    return {constant: estimate(values[constant], draws, analysis) for constant, draws in _constants(name, form, thetas)}


def estimate(value: float, draws: np.ndarray | None, analysis: AnalysisConfig) -> Estimate:
    """A value with the interval of its ``draws``, if there are any."""
    if draws is None:
        return Estimate(value=float(value))
    low, high = bootstrap.percentiles(draws, analysis.confidence)
    return Estimate(value=float(value), low=float(low), high=float(high))


def _estimates(
    form: Form, theta: np.ndarray, thetas: np.ndarray | None, log_x: np.ndarray, analysis: AnalysisConfig
) -> list[Estimate]:
    values = np.exp(form.log_loss(theta, log_x)[0])
    if thetas is None:
        return [Estimate(value=float(value)) for value in values]
    low, high = bootstrap.percentiles(np.exp(form.log_loss(thetas, log_x)), analysis.confidence)
    ends = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Estimate(value=value, low=low, high=high) for value, low, high in ends]


def _curve(
    form: Form, theta: np.ndarray, thetas: np.ndarray | None, reach: Sequence[float], analysis: AnalysisConfig
) -> list[CurvePoint]:
    first, last = form.log_x[0].min(), form.log_x[0].max()
    ends = [first, last, *np.log(reach)]
    log_x = np.linspace(min(ends), max(ends), CURVE_PLACES)
    estimates = _estimates(form, theta, thetas, log_x[None], analysis)
    outside = (log_x < first - 1e-9) | (log_x > last + 1e-9)
    return [
        CurvePoint(x=float(np.exp(x)), fitted=value, extrapolation=bool(out))
        for x, value, out in zip(log_x, estimates, outside, strict=True)
    ]


def _at_bound(exponent: str, value: float) -> str | None:
    low, high = EXPONENTS
    if value <= low * 1.001:
        return f"{exponent} ran to its least, {low}: the loss hardly bends, and any E would do"
    if value >= high * 0.999:
        return f"{exponent} ran to its most, {high}: the loss falls once and then no more, which is no power law"
    return None


def _doubts(name: LawName, form: Form, theta: np.ndarray, thetas: np.ndarray | None, log_y: np.ndarray) -> list[str]:
    doubts = []
    nothing = log_y.min() - NEGLIGIBLE / 2
    if theta[0] < nothing:
        doubts.append("E ran to zero: the points do not show a floor")
    elif thetas is not None and (share := float((thetas[:, 0] < nothing).mean())) > UNIDENTIFIED:
        doubts.append(f"E is not identified: it is zero in {share:.0%} of the draws")
    if thetas is not None:
        for k, (_, exponent, _) in enumerate(TERMS[name]):
            draws = form.term(thetas, k)[1]
            at_bound = float(((draws <= EXPONENTS[0] * 1.001) | (draws >= EXPONENTS[1] * 0.999)).mean())
            if at_bound > UNIDENTIFIED:
                doubts.append(f"{exponent} is not identified: it ran to a bound in {at_bound:.0%} of the draws")
    return doubts


def _early(samples: Samples, residuals: np.ndarray) -> list[str]:
    """Of curves: do the runs' first points lie off the law, all to one side?"""
    if samples.runs == len(residuals):
        return []
    first = np.concatenate([[True], np.diff(samples.run) > 0])
    mean, rest = float(residuals[first].mean()), float(np.sqrt((residuals[~first] ** 2).mean()))
    if abs(mean) < EARLY * rest:
        return []
    return [f"the curves' first points lie {mean:+.1%} off the law: a larger curve_from leaves them out"]
