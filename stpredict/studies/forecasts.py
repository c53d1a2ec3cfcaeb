"""What the trials of a study forecast, where their jobs include the evaluation of forecasts: means and deviations of
every cell of a comparison, as papers print them, beside the yardsticks. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

from stpredict.evaluation.forecast_scores import OWN_NAMES, PREDICTION, ForecastEvaluation
from stpredict.studies.compare import Cell, spread
from stpredict.studies.points import TrialPoints

MEASURED = ("mse", "mae", "rmse", "frame_mse", "frame_mae", "ssim", "psnr")
YARDSTICKS = tuple(name for name in OWN_NAMES if name != PREDICTION)


@dataclass(frozen=True)
class Row:
    """``values`` of each metric: mean, and standard deviation between ``trials``; None where that is not known."""

    name: str
    trials: int
    values: Sequence[tuple[float | None, float | None]]


@dataclass(frozen=True)
class ForecastTable:
    titles: Sequence[str]
    rows: Sequence[Row]


def of_trial(trial: TrialPoints, metric: str, method: str = PREDICTION) -> float | None:
    """Over all samples, lead times and channels; None where it was not measured."""
    found = trial.forecast and trial.forecast.methods.get(method)
    values = found and found.metrics.get(metric)
    return values.overall if values else None


def forecast_table(cells: Sequence[Cell], several_colours: bool) -> ForecastTable | None:
    """A row for each cell, then one for each yardstick; None where no trial's forecasts were measured."""
    trials = [trial for cell in cells for trial in cell.trials if trial.forecast]
    if not trials:
        return None
    first: ForecastEvaluation = trials[0].forecast
    metrics = [name for name in MEASURED if any(of_trial(trial, name) is not None for trial in trials)]
    rows = []
    for cell in cells:
        own = [trial for trial in cell.trials if trial.forecast]
        name = f"{cell.label}, {cell.colour}" if several_colours and cell.colour != cell.label else cell.label
        rows.append(Row(name, len(own), [spread([of_trial(t, m) for t in own]) for m in metrics]))
    for method in YARDSTICKS:
        own = [trial for trial in trials if method in trial.forecast.methods]
        if own:
            rows.append(Row(method, len(own), [spread([of_trial(t, m, method) for t in own]) for m in metrics]))
    return ForecastTable([first.title(name) for name in metrics], rows)
