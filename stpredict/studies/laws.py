"""Which points the laws of losses are fitted to: L(N) of sizes at equal tokens, L(D) of each size, L(N, D) of all runs;
or the words why not. Torch-free."""

from collections.abc import Sequence

import numpy as np
from scipy.special import fdtrc

from stpredict.studies import bootstrap
from stpredict.studies.analysis import NotFitted
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.fit import Form, fit
from stpredict.studies.law import Fitted, Noise, fit_law
from stpredict.studies.measured import Measured, Samples, by_size, curve_points, final_points, points_at

EQUAL = 0.01  # numbers of tokens that differ by less are the same
THREE_SIZES = Noise(none="three constants go through three sizes, whatever the law is")


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
        Noise(samples.runs - 3) if sizes > 3 else THREE_SIZES,
        of=of,
        source=f"the loss of every run at D = {tokens:.4g} tokens",
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
        none = Noise(none="three constants go through three numbers of tokens")
        noise = Noise(samples.runs - 3) if enough else none
        results.append(fit_law("L(D)", samples, analysis, noise, of=size, source=source))
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
        noise = Noise(none="nothing says how other seeds would differ")
        if freedom >= bootstrap.FEWEST_FREEDOM and analysis.bootstrap:
            places = [np.log(d / d[-1]) for (d,) in _by_run(samples, samples.d)]
            copies = bootstrap.pooled_copies(places, fits[size], pool, freedom, analysis.bootstrap)
            how = f"bootstrap with the residuals of {len(pool)} runs of all sizes, {freedom} degrees of freedom"
            noise = Noise(copies=copies, how=how)
        elif freedom:
            noise = Noise(none="too few seeds say how others would differ")
        results.append(fit_law("L(D)", samples, analysis, noise, of=size, source=source))
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
        Noise(samples.runs - between) if sizes > 3 else THREE_SIZES,
        source=_of_curves(analysis) if curves else "the last point of every run",
    )


def _of_curves(analysis: AnalysisConfig) -> str:
    return f"the runs' curves after warm-up and {analysis.curve_from:.0%} of their steps, thinned"


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
