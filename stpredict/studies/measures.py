"""What the trials of a study are compared by, beside what copying and the like would have: one name for each measure,
in charts and tables. Torch-free."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean

from stpredict.studies.forecasts import MEASURED, YARDSTICKS, of_trial
from stpredict.studies.points import TrialPoints

Measure = Callable[[TrialPoints], float | None]
MEASURES: Mapping[str, Measure] = {
    "loss": lambda trial: trial.final_loss,
    "psnr": lambda trial: trial.evaluation and trial.evaluation.prediction.psnr,
    "ssim": lambda trial: trial.evaluation and trial.evaluation.prediction.ssim,
    "frames_per_s": lambda trial: trial.speed and trial.speed.frames_per_s,
    **{f"forecast_{name}": partial(of_trial, metric=name) for name in MEASURED},
}
METHODS = (*YARDSTICKS, "repeat last frame", "reconstruction")
_TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "frames_per_s": "frames/s of sampling"}
_DRAWN = {"rmse": ("rmse", "mae"), "frame_mse": ("frame_mse", "frame_mae")}  # headline → what is drawn of forecasts


def measured(trials: Sequence[TrialPoints]) -> dict[str, str]:
    """Name of each measure that some trial has → its title, with its unit."""
    there = [name for name, of in MEASURES.items() if any(of(trial) is not None for trial in trials)]
    return {name: _title(name, trials) for name in there}


def drawn(trials: Sequence[TrialPoints]) -> dict[str, str]:
    """Those of ``measured`` that charts show: of forecasts two errors, in the convention of their headline."""
    forecast = next((trial.forecast for trial in trials if trial.forecast), None)
    shown = [f"forecast_{name}" for name in _DRAWN[forecast.headline]] if forecast else []
    titles = measured(trials)
    titles |= {name: f"{titles[name]} of forecasts" for name in shown}
    return {name: titles[name] for name in ("loss", *_TITLES, *shown) if name in titles}


def _title(name: str, trials: Sequence[TrialPoints]) -> str:
    if name == "loss":
        return f"validation {next((trial.metric for trial in trials if trial.metric), 'loss')}"
    if name in _TITLES:
        return _TITLES[name]
    first = next(trial.forecast for trial in trials if trial.forecast)
    return first.title(name.removeprefix("forecast_"))


def yardstick(trial: TrialPoints, measure: str, method: str) -> float | None:
    """What ``method``, one of METHODS, has of ``measure`` on the samples that the trial was evaluated on."""
    if measure.startswith("forecast_"):
        return of_trial(trial, measure.removeprefix("forecast_"), method)
    scores = trial.evaluation and trial.evaluation.methods.get(method)
    return getattr(scores, measure, None) if scores else None


def levels(measure: str, trials: Sequence[TrialPoints]) -> dict[str, float]:
    """Yardstick → its mean, of those that have the measure."""
    found = {method: [yardstick(trial, measure, method) for trial in trials] for method in METHODS}
    known = {method: [value for value in values if value is not None] for method, values in found.items()}
    return {method: mean(values) for method, values in known.items() if values}
