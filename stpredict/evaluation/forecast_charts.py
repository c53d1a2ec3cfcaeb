"""Charts of a forecast's evaluation: errors against lead time, and where on the map they are."""

from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from stpredict.evaluation.charts import STYLE
from stpredict.evaluation.forecast_scores import ForecastEvaluation, Values

LINES = {
    "prediction": {"color": "#3b82f6", "marker": "o"},
    "persistence": {"color": "#e08a00", "marker": "s", "linestyle": "--"},
    "climatology": {"color": "#12a150", "marker": "^", "linestyle": ":"},
}
OTHER_COLOURS = ("#a855f7", "#e5484d", "#0ea5b7", "#84650a", "#d6409f", "#6b7280")
PANELS = {"field": ("rmse", "mae", "latitude_acc", "acc"), "frames": ("frame_mse", "frame_mae", "ssim", "psnr")}
MOST_PANELS = 3
MOST_CHANNELS = 12  # rows of a chart


def lead_time_chart(evaluation: ForecastEvaluation) -> Figure:
    """Errors of every method per lead time; a row per channel where there are several of a field."""
    e = evaluation
    rows = {"": {name: method.metrics for name, method in e.methods.items()}}
    if e.data == "field" and len(e.channels) > 1:
        rows = {
            channel: {name: method.channels[channel] for name, method in e.methods.items()}
            for channel in e.channels[:MOST_CHANNELS]
        }
    metrics = _panels(e, next(iter(rows.values()))["prediction"])
    leads = e.leads_h or list(range(1, e.output_frames + 1))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(metrics), 0.6 + 2.6 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(metrics), squeeze=False)
        for line, (channel, methods), unit in zip(grid, rows.items(), e.units, strict=False):
            for axes, metric in zip(line, metrics, strict=True):
                for number, (method, values) in enumerate(methods.items()):
                    _line(axes, leads, method, number, values[metric])
                title = e.title(metric, unit if channel else None)
                axes.set(title=f"{channel}: {title}" if channel else title)
                axes.set_xlabel("lead time (h)" if e.leads_h else "predicted frame")
                axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def error_map_chart(
    evaluation: ForecastEvaluation, bias: np.ndarray, rmse: np.ndarray, origin: Literal["upper", "lower"]
) -> Figure:
    """Mean error and RMSE of the prediction at every grid point, ``(h, w, c)``: a row per channel. ``origin``: where
    the first row is."""
    channels = evaluation.channels[:MOST_CHANNELS]
    h, w, _ = bias.shape
    height = float(np.clip(3.6 * h / w, 1.2, 4))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 0.5 + (height + 0.4) * len(channels)), layout="constrained")
        grid = figure.subplots(len(channels), 2, squeeze=False)
        for number, (line, channel, unit) in enumerate(zip(grid, channels, evaluation.units, strict=False)):
            said = f" ({unit})" if unit else ""
            most = float(np.abs(bias[..., number]).max()) or 1.0
            parts = (
                ("bias", bias, {"cmap": "RdBu_r", "vmin": -most, "vmax": most}),
                ("RMSE", rmse, {"cmap": "viridis", "vmin": 0}),
            )
            for axes, (name, values, colours) in zip(line, parts, strict=True):
                image = axes.imshow(values[..., number], origin=origin, interpolation="nearest", **colours)
                axes.set(title=f"{channel}: {name}{said}", xticks=[], yticks=[])
                figure.colorbar(image, ax=axes, shrink=0.9)
    return figure


def _panels(e: ForecastEvaluation, measured: dict[str, Values]) -> list[str]:
    found = [name for name in PANELS[e.data] if name in measured]
    if "latitude_acc" in found and "acc" in found:
        found.remove("acc")
    return found[:MOST_PANELS] if e.data == "field" else found


def _line(axes, leads: list[float], method: str, number: int, values: Values) -> None:
    look = LINES.get(method) or {
        "color": OTHER_COLOURS[(number - 1) % len(OTHER_COLOURS)],
        "marker": "v",
        "linestyle": "-",
    }
    shown = [np.nan if value is None else value for value in values.per_lead]
    axes.plot(leads, shown, label=method, markersize=4, **look)
