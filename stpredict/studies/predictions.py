"""What the laws say of models that were not trained. Torch-free."""

from collections.abc import Sequence

import numpy as np

from stpredict.studies.analysis import Prediction
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.law import Fitted

FAR = 10  # times the largest size: beyond, a prediction is hardly more than the law's form


def predictions(laws: Sequence[Fitted], analysis: AnalysisConfig) -> list[Prediction]:
    """For every N of ``predict``: by L(N) at its D (the largest, where there are several), and by L(N, D) at every D
    of ``predict_tokens``."""
    found = []
    of_sizes = [fitted for fitted in laws if fitted.law.name == "L(N)"][-1:]
    joint = [fitted for fitted in laws if fitted.law.name == "L(N, D)"]
    for n in analysis.predict:
        found += [_predicted(fitted, n, fitted.law.points[0].tokens, analysis) for fitted in of_sizes]
        for fitted in joint:
            largest = max(point.tokens for point in fitted.law.points)
            found += [_predicted(fitted, n, d, analysis) for d in analysis.predict_tokens or (largest,)]
    return found


def _predicted(fitted: Fitted, n: float, d: float, analysis: AnalysisConfig) -> Prediction:
    law = fitted.law
    sizes, tokens = [point.parameters for point in law.points], [point.tokens for point in law.points]
    places = [np.log(n), np.log(d)][: fitted.form.terms]
    loss = fitted.estimate(analysis, *places)
    largest = fitted.estimate(analysis, *[np.log(max(sizes)), np.log(d)][: fitted.form.terms])
    factor, token_factor = n / max(sizes), d / max(tokens)
    outside = n < min(sizes) or factor > 1 or (fitted.form.terms > 1 and (token_factor > 1 or d < min(tokens)))
    warnings = []
    if factor > FAR:
        warnings.append(f"{factor:.3g} times the largest size that was trained")
    if fitted.form.terms > 1 and token_factor > FAR:
        warnings.append(f"{token_factor:.3g} times the most tokens that were trained on")
    effect = abs(loss.value - largest.value)
    if loss.low is None:
        warnings.append(f"no interval ({law.interval.removeprefix('none: ')})")
    elif factor > 1 and loss.high - loss.low > effect:
        warnings.append(
            f"the interval ({loss.high - loss.low:.2g}) is wider than what the law expects of the larger size "
            f"({effect:.2g} less than at N = {max(sizes):.4g})"
        )
    return Prediction(
        law=law.name,
        of=law.of,
        parameters=n,
        tokens=d,
        loss=loss,
        extrapolation=bool(outside),
        factor=factor,
        token_factor=token_factor,
        warnings=warnings,
    )
