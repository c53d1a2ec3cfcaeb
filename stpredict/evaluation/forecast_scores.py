"""What an evaluate job writes of forecasts to metrics.json, and how it is said: a table and a sentence. Torch-free.

docs/forecasting_metrics.md has the formula and the convention of every name in METRICS.
"""

import csv
import io
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from stpredict.evaluation.units import four_digits

PREDICTION, PERSISTENCE, CLIMATOLOGY = "prediction", "persistence", "climatology"
OWN_NAMES = (PREDICTION, PERSISTENCE, CLIMATOLOGY)


class Metric(NamedTuple):
    title: str
    unit: Literal["", "scaled", "physical", "physical²", "dB"]
    higher_is_better: bool = False


METRICS = {
    "rmse": Metric("RMSE", "physical"),
    "mae": Metric("MAE", "physical"),
    "mse": Metric("MSE", "physical²"),
    "latitude_rmse": Metric("latitude RMSE", "physical"),
    "latitude_rmse_pooled": Metric("latitude RMSE, pooled", "physical"),
    "acc": Metric("ACC", "", True),
    "latitude_acc": Metric("latitude ACC", "", True),
    "latitude_acc_pooled": Metric("latitude ACC, pooled", "", True),
    "frame_mse": Metric("frame MSE", "scaled"),
    "frame_mae": Metric("frame MAE", "scaled"),
    "ssim": Metric("SSIM", "", True),
    "ssim_range_2": Metric("SSIM, range 2", "", True),
    "psnr": Metric("PSNR", "dB", True),
    "psnr_wrapped": Metric("PSNR, wrapped", "dB", True),
    "lpips_alexnet": Metric("LPIPS AlexNet", ""),
    "lpips_vgg16": Metric("LPIPS VGG16", ""),
}
#: In the log's table; the others stand in metrics.json and lead_times.csv.
SHOWN = {
    "field": ("rmse", "mae", "latitude_rmse", "latitude_acc", "acc", "frame_mse", "frame_mae", "ssim"),
    "frames": (
        "frame_mse",
        "frame_mae",
        "ssim",
        "ssim_range_2",
        "psnr",
        "psnr_wrapped",
        "lpips_alexnet",
        "lpips_vgg16",
    ),
}


class Values(BaseModel):
    """None where it is not defined: the correlation of a climatology's anomalies, which are none."""

    overall: float | None
    per_lead: list[float | None]


class MethodScores(BaseModel):
    """``metrics`` over all channels, by the names of METRICS, but for those that mean something of one channel only;
    ``channels`` those of each channel, where there are several."""

    metrics: dict[str, Values]
    channels: dict[str, dict[str, Values]] = {}
    forecaster: str | None = None
    step: int | None = None  # of the forecaster's training
    seconds_per_sample: float | None = None


class Difference(BaseModel):
    """Of the prediction from another method on the same samples: prediction - other. ``stderr`` is over samples, or,
    where they bear times, over stretches of time as long as one (neighbouring windows overlap, and say much the same);
    None where there is but one."""

    other: str
    metric: str
    value: float
    stderr: float | None

    @property
    def is_small(self) -> bool:
        """Of less than two standard errors."""
        return self.stderr is not None and abs(self.value) < 2 * self.stderr

    def in_words(self) -> str:
        return f"{self.value:+.3g}" + (f" ± {self.stderr:.2g}" if self.stderr is not None else "")


class ForecastEvaluation(BaseModel):
    """Contents of metrics.json. The first of ``methods`` is the prediction that is judged."""

    kind: Literal["forecast"] = "forecast"
    data: Literal["frames", "field"]
    samples: int
    split: str | None = None  # of the shards that they are from
    input_frames: int
    output_frames: int
    channels: list[str]
    units: list[str]
    leads_h: list[float] | None
    methods: dict[str, MethodScores]
    differences: list[Difference]
    headline: str  # the metric that says who wins
    climatology: str | None = None  # what it is a mean of
    notes: list[str] = []  # what was left out, and why

    @property
    def unit(self) -> str | None:
        return self.units[0] if len(set(self.units)) == 1 else None

    @property
    def of_what(self) -> str:
        return f"{self.samples:,} samples" + (f" of the split {self.split}" if self.split else "")

    @property
    def beats_persistence(self) -> bool:
        gain = self._difference(PERSISTENCE).value
        return gain > 0 if METRICS[self.headline].higher_is_better else gain < 0

    @property
    def lead_names(self) -> list[str]:
        """``+6 h``, or the number of the predicted frame, from 1."""
        if self.leads_h is None:
            return [str(number) for number in range(1, self.output_frames + 1)]
        return [f"+{lead:g} h" for lead in self.leads_h]

    def of(self, method: str, channel: str | None = None) -> dict[str, Values]:
        """The metrics of a method over all channels, or of one of several."""
        scores = self.methods[method]
        return scores.metrics if channel is None else scores.channels[channel]

    def shown_of(self, channel: str | None = None) -> list[str]:
        """Metrics for a table: those of SHOWN that were measured."""
        return [name for name in SHOWN[self.data] if name in self.of(PREDICTION, channel)]

    def _difference(self, other: str) -> Difference:
        return next(d for d in self.differences if (d.other, d.metric) == (other, self.headline))

    def value(self, method: str) -> float:
        """Of the headline, over all."""
        return self.methods[method].metrics[self.headline].overall

    def in_unit(self, metric: str, unit: str | None = None) -> str:
        """The unit that a metric's values have, with a space before it; ``unit`` of a channel."""
        unit = self.unit if unit is None else unit
        match METRICS[metric].unit:
            case "physical":
                return f" {unit}" if unit else ""
            case "physical²":
                return f" [{unit}]²" if unit else ""
            case "dB":
                return " dB"
            case _:
                return ""

    def title(self, metric: str, unit: str | None = None) -> str:
        """Of a column or a chart: the metric's name and its unit; ``unit`` of a channel."""
        said = self.in_unit(metric, unit).strip()
        return f"{METRICS[metric].title} ({said})" if said else METRICS[metric].title

    def verdict(self) -> str:
        """Whether the prediction beats persistence, and by how much, whichever way it falls."""
        own, copied = self.value(PREDICTION), self.value(PERSISTENCE)
        difference, unit = self._difference(PERSISTENCE), self.in_unit(self.headline)
        share = f"{abs(difference.value) / copied:.1%}" if copied else "no share that can be named"
        title = METRICS[self.headline].title
        numbers = f"{title} {own:.4g}{unit} against {copied:.4g}{unit}, difference {difference.in_words()}{unit}"
        numbers += ", within two standard errors" if difference.is_small else ""
        if self.beats_persistence:
            return f"Predictions beat persistence by {share} ({numbers})."
        return f"Predictions do NOT beat persistence: {share} worse ({numbers})."

    def _where_persistence_wins(self) -> list[str]:
        own, copied = (self.methods[name].metrics[self.headline].per_lead for name in (PREDICTION, PERSISTENCE))
        sign = 1 if METRICS[self.headline].higher_is_better else -1
        lost = [lead for lead, a, b in zip(self.lead_names, own, copied, strict=True) if sign * (a - b) <= 0]
        if not 0 < len(lost) < len(own):
            return []
        what = "at" if self.leads_h else "in predicted frames"
        return [f"Persistence is as good or better {what} {', '.join(lost)}."]

    def comparisons(self) -> list[str]:
        """Where persistence is as good, or better, if at some lead times alone; and a line for each other method; by
        the headline."""
        lines = self._where_persistence_wins()
        for name in self.methods:
            if name in (PREDICTION, PERSISTENCE):
                continue
            difference = self._difference(name)
            better = difference.value > 0 if METRICS[self.headline].higher_is_better else difference.value < 0
            said = "better than" if better else "NOT better than"
            near = ", within two standard errors" if difference.is_small else ""
            numbers = f"{METRICS[self.headline].title} {difference.in_words()}{self.in_unit(self.headline)}{near}"
            lines.append(f"Prediction is {said} {name}: {numbers}.")
        return lines


def read_forecast_metrics(path: Path) -> ForecastEvaluation | None:
    """Of metrics.json, where it is of forecasts; else None."""
    try:
        return ForecastEvaluation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def as_text(evaluation: ForecastEvaluation) -> str:
    """The verdict, the means of every method as a table, those of each channel where there are several, and notes."""
    e = evaluation
    console = Console(width=160)
    with console.capture() as capture:
        console.print(f"means over {e.of_what}, {e.output_frames} frames after {e.input_frames} given ones:")
        console.print(_table(e))
        for channel, unit in zip(e.channels, e.units, strict=True):
            if len(e.channels) > 1:
                console.print(f"{channel}:", markup=False)
                console.print(_table(e, channel, unit))
    climatology = [f"climatology: {e.climatology}"] if e.climatology else []
    return "\n".join([e.verdict(), *e.comparisons(), capture.get().rstrip(), *climatology, *e.notes])


def _table(e: ForecastEvaluation, channel: str | None = None, unit: str | None = None) -> Table:
    shown = e.shown_of(channel)
    table = Table("method", *(e.title(name, unit) for name in shown))
    if timed := any(scores.seconds_per_sample for scores in e.methods.values()):
        table.add_column("ms per sample")
    for method, scores in e.methods.items():
        seconds = scores.seconds_per_sample
        speed = [four_digits(seconds and 1000 * seconds)] if timed else []
        table.add_row(method, *(four_digits(e.of(method, channel)[name].overall) for name in shown), *speed)
    return table


def as_csv(evaluation: ForecastEvaluation) -> str:
    """A row for each method, channel (``all``: over all of them) and lead time; a column for each metric."""
    e = evaluation
    names = [name for name in METRICS if any(name in found for _, _, found in _groups(e))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "channel", "frame", "lead_h", *names])
    for method, channel, values in _groups(e):
        for at in range(e.output_frames):
            of_lead = [values[name].per_lead[at] if name in values else None for name in names]
            hours = e.leads_h[at] if e.leads_h else ""
            numbers = ["" if value is None else repr(value) for value in of_lead]
            writer.writerow([method, channel, at + 1, hours, *numbers])
    return file.getvalue()


def _groups(e: ForecastEvaluation) -> list[tuple[str, str, dict[str, Values]]]:
    groups = []
    for method, scores in e.methods.items():
        groups += [(method, "all", scores.metrics)]
        groups += [(method, channel, values) for channel, values in scores.channels.items()]
    return groups
