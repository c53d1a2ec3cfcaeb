"""The laws of losses: L(N), L(D), L(C) and L(N, D), fitted with intervals, or the words why not. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from stpredict.studies import bootstrap
from stpredict.studies.analysis import CurvePoint, Estimate, Law, LawName, NotFitted, Point
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.fit import EXPONENTS, NEGLIGIBLE, Form, fit
from stpredict.studies.measured import Measured, Samples, curve_points, final_points, points_at

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
EQUAL = 0.01  # numbers of tokens that differ by less are the same
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


def fit_law(
    name: LawName,
    samples: Samples,
    analysis: AnalysisConfig,
    *,
    of: str,
    source: str,
    freedom: int | None,
    no_interval: str = "",
    noisy: np.ndarray | None = None,
    how: str = "",
    reach: Sequence[float] = (),
) -> Fitted | NotFitted:
    """``freedom``: of the noise between runs; None: no interval, because of ``no_interval``. ``noisy`` (draws,
    points), made as ``how`` says, is in the place of the wild cluster bootstrap's. The curve reaches to ``reach``."""
    log_x = np.log([getattr(samples, array) for *_, array in TERMS[name]])
    form, log_y = Form(log_x), np.log(samples.loss)
    theta, delta = fit(form, log_y)
    for (_, exponent, _), k in zip(TERMS[name], range(form.terms), strict=True):
        if why := _at_bound(exponent, form.term(theta, k)[1]):
            return NotFitted(name=name, of=of, why=why)
    if noisy is None and freedom is not None and freedom >= bootstrap.FEWEST_FREEDOM and analysis.bootstrap:
        noisy = bootstrap.copies(form, theta, log_y, samples.run, freedom, analysis.bootstrap)
        how = f"wild cluster bootstrap of {samples.runs} runs, {freedom} degrees of freedom"
    thetas = None if noisy is None else bootstrap.refitted(form, theta, delta, noisy)
    if thetas is None:
        how = "none: " + ("bootstrap is 0" if not analysis.bootstrap else no_interval or _too_few(samples, freedom))
    else:
        how = f"{100 * analysis.confidence:g}%; {how}; {analysis.bootstrap} draws"
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
        interval=how,
        warnings=[*_doubts(name, form, theta, thetas, log_y), *_early(samples, residuals)],
    )
    return Fitted(law, form, theta, thetas)


def _too_few(samples: Samples, freedom: int) -> str:
    return f"{samples.runs} runs leave {max(freedom, 0)} degrees of freedom; an interval takes two or more"


def sizes_at_equal_tokens(runs: Sequence[Measured], analysis: AnalysisConfig) -> list[Fitted | NotFitted]:
    """L(N), one for each D at which three sizes or more have a point: their last; or, of curves, the largest D that
    every run came to."""
    if analysis.points == "curve":
        tokens = min(run.tokens for run in runs)
        groups = [(tokens, points_at(runs, tokens))]
    else:
        groups = [(tokens, final_points(members)) for tokens, members in _by_tokens(runs)]
        fittable = [group for group in groups if len(set(group[1].sizes)) >= 3]
        groups = fittable or groups[-1:]
    return [_sizes_at(tokens, samples, analysis, several=len(groups) > 1) for tokens, samples in groups]


def _sizes_at(tokens: float, samples: Samples, analysis: AnalysisConfig, several: bool) -> Fitted | NotFitted:
    of = f"D = {tokens:.4g}" if several else ""
    n, sizes = np.unique(samples.n), len(np.unique(samples.n))
    if sizes < 3:
        why = f"{sizes} size{'s' * (sizes != 1)} with a run at the same number of tokens; a fit takes three or more"
        return NotFitted(name="L(N)", of=of, why=why)
    means, error = _means(samples)
    best = int(means.argmin())
    if means[-1] > means[best] + 2 * error:
        why = (
            f"the loss does not fall with N: {means[best]:.4g} at N = {n[best]:.4g} but {means[-1]:.4g} at the largest,"
            f" N = {n[-1]:.4g}; larger models may need another learning rate, or more steps"
        )
        return NotFitted(name="L(N)", of=of, why=why)
    fitted = fit_law(
        "L(N)",
        samples,
        analysis,
        of=of,
        source=f"the loss of every run at D = {tokens:.4g} tokens",
        freedom=samples.runs - 3 if sizes > 3 else None,
        no_interval="three constants go through three sizes, whatever the law is" if sizes == 3 else "",
        reach=analysis.predict,
    )
    if isinstance(fitted, Fitted):
        for i in np.flatnonzero(np.diff(means) > 0):
            rise = f"N = {n[i]:.4g} ({means[i]:.4g}) to N = {n[i + 1]:.4g} ({means[i + 1]:.4g})"
            fitted.law.warnings.append(f"the loss rises from {rise}")
        if sizes == 3:
            fitted.law.warnings.append("three sizes: nothing is left over that could contradict the law")
        fitted.law.warnings.extend(_lack_of_fit(samples, fitted))
    return fitted


def tokens_of_each_size(runs: Sequence[Measured], analysis: AnalysisConfig) -> list[Fitted | NotFitted]:
    """L(D) of every size: its E holds what more tokens would not bring that size. From curves, or from the last points
    of runs of three lengths or more."""
    curves = analysis.points == "curve"
    results, fittable = [], {}
    for size, members in by_size(runs).items():
        samples = curve_points(members, analysis.curve_from) if curves else final_points(members)
        lengths = len(_distinct(samples.d))
        if lengths < 3:
            why = f"{lengths} number{'s' * (lengths != 1)} of tokens; a fit takes three or more"
            results.append(NotFitted(name="L(D)", of=size, why=why))
        else:
            fittable[size] = samples
    if curves:
        return results + _of_curves_of_each_size(fittable, analysis)
    for size, samples in fittable.items():
        source = "the last points of runs of several lengths"
        enough = len(_distinct(samples.d)) > 3
        freedom = samples.runs - 3 if enough else None
        why = "" if enough else "three constants go through three numbers of tokens"
        results.append(fit_law("L(D)", samples, analysis, of=size, source=source, freedom=freedom, no_interval=why))
    return results


def _of_curves_of_each_size(fittable: dict[str, Samples], analysis: AnalysisConfig) -> list[Fitted | NotFitted]:
    """The noise between runs is pooled over the sizes: two seeds of one say next to nothing about it."""
    source = _of_curves(analysis)
    pool, freedom = [], 0
    fits = {}
    for size, samples in fittable.items():
        form, log_y = Form(np.log(samples.d)), np.log(samples.loss)
        theta, _ = fit(form, log_y)
        fits[size] = form.log_loss(theta)[0]
        if samples.runs > 1:
            residuals = bootstrap.corrected(form, theta, log_y, samples.run, power=0.5)
            pool += [(np.log(d / d[-1]), r) for d, r in _by_run(samples, samples.d, residuals)]
            freedom += samples.runs - 1
    results = []
    for size, samples in fittable.items():
        noisy, how, why = None, "", "nothing says how other seeds would differ"
        if freedom >= bootstrap.FEWEST_FREEDOM and analysis.bootstrap:
            places = [np.log(d / d[-1]) for (d,) in _by_run(samples, samples.d)]
            noisy = bootstrap.pooled_copies(places, fits[size], pool, freedom, analysis.bootstrap)
            how = f"bootstrap with the residuals of {len(pool)} runs of all sizes, {freedom} degrees of freedom"
        elif freedom:
            why = "too few seeds say how others would differ"
        results.append(
            fit_law(
                "L(D)", samples, analysis, of=size, source=source, freedom=None, noisy=noisy, how=how, no_interval=why
            )
        )
    return results


def _by_run(samples: Samples, *arrays: np.ndarray) -> list[list[np.ndarray]]:
    return [[array[samples.run == run] for array in arrays] for run in range(samples.runs)]


def joint_law(runs: Sequence[Measured], analysis: AnalysisConfig) -> Fitted | NotFitted:
    """L(N, D) of all runs."""
    curves = analysis.points == "curve"
    samples = curve_points(runs, analysis.curve_from) if curves else final_points(runs)
    sizes, lengths = len(np.unique(samples.n)), len(_distinct(samples.d))
    for count, what in ((sizes, "size"), (lengths, "number")):
        if count < 3:
            words = f"{count} {what}{'s' * (count != 1)}{' of tokens' * (what == 'number')}"
            return NotFitted(name="L(N, D)", why=f"{words}; a fit takes three or more")
    places = len({(n, round(np.log(d) / EQUAL)) for n, d in zip(samples.n, samples.d, strict=True)})
    if places < 6:
        return NotFitted(name="L(N, D)", why=f"{places} pairs of N and D; five constants take six or more")
    between = 3 if curves else 5
    return fit_law(
        "L(N, D)",
        samples,
        analysis,
        of="",
        source=_of_curves(analysis) if curves else "the last point of every run",
        freedom=samples.runs - between if sizes > 3 else None,
        no_interval="three constants go through three sizes, whatever the law is" if sizes == 3 else "",
    )


def _of_curves(analysis: AnalysisConfig) -> str:
    return f"the runs' curves after warm-up and {analysis.curve_from:.0%} of their steps, thinned"


def by_size(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """From the smallest to the largest."""
    sizes: dict[str, list[Measured]] = {}
    for run in sorted(runs, key=lambda run: run.n):
        sizes.setdefault(run.size, []).append(run)
    return sizes


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


def _means(samples: Samples) -> tuple[np.ndarray, float]:
    """Mean loss of every N, ascending, and the standard error of the difference of two (0 without repetitions)."""
    groups = [samples.loss[samples.n == n] for n in np.unique(samples.n)]
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    free = sum(len(group) - 1 for group in groups)
    fewest = min(len(group) for group in groups)
    return np.array([group.mean() for group in groups]), float(np.sqrt(2 * within / free / fewest)) if free else 0.0


def _lack_of_fit(samples: Samples, fitted: Fitted) -> list[str]:
    """Do the sizes' means lie further off the law than their seeds' spread explains? (F test, 1 %)"""
    log_y, n = np.log(samples.loss), np.unique(samples.n)
    groups = [log_y[samples.n == size] for size in n]
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    free, left = len(log_y) - len(n), len(n) - fitted.form.constants
    if free < 2 or left < 1 or within == 0:
        return []
    off = ((log_y - fitted.form.log_loss(fitted.theta)[0]) ** 2).sum() - within
    if fdtrc(left, free, off / left / (within / free)) >= 0.01:
        return []
    return ["the sizes lie further off the law than their seeds differ: the interval leaves the law's own error out"]


def _by_tokens(runs: Sequence[Measured]) -> list[tuple[float, list[Measured]]]:
    """Runs of the same number of tokens together, ascending."""
    groups: list[tuple[float, list[Measured]]] = []
    for run in sorted(runs, key=lambda run: run.tokens):
        if groups and run.tokens <= groups[-1][0] * (1 + EQUAL):
            groups[-1][1].append(run)
        else:
            groups.append((run.tokens, [run]))
    return groups


def _distinct(values: np.ndarray) -> np.ndarray:
    """One of all that are equal to within EQUAL."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] > values[:-1] * (1 + EQUAL)])]
