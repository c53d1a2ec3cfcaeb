"""Charts of an evaluation and of a training run, as matplotlib figures, and as SVG that takes the page's colours."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stpredict.evaluation.results import Evaluation

INK = "#1f2328"  # text and axes; in SVG it becomes the colour of the text around it, so that dark pages work
STYLE = {
    **dict.fromkeys(
        ("text.color", "xtick.color", "ytick.color", "grid.color", "axes.edgecolor", "axes.labelcolor"), INK
    ),
    "axes.grid": True,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
}
LINES = {
    "prediction": {"color": "#3b82f6", "marker": "o"},
    "repeat last frame": {"color": "#e08a00", "marker": "s", "linestyle": "--"},
    "reconstruction": {"color": "#12a150", "marker": "^", "linestyle": ":"},
}
TRAIN, VALIDATION = "#3b82f6", "#e5484d"
# What is worth seeing of a training run: metric → what the panel is called.
PANELS = {
    "tokenizer": {"loss": "loss", "psnr": "PSNR (dB)", "codes_used": "codes in use"},
    "prior": {"cross_entropy": "cross-entropy (nats)", "accuracy": "accuracy of the likeliest token"},
    "forecaster": {"loss": "loss (scaled values)", "mse": "MSE (scaled values)", "mae": "MAE (scaled values)"},
}
MOST_POINTS = 1000


def frame_chart(evaluation: Evaluation) -> Figure:
    """PSNR and SSIM against the frame's number, counted from 1."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axes, metric, title in zip(figure.subplots(1, 2), ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
            for name, scores in evaluation.methods.items():
                values = getattr(scores.per_frame, metric)
                axes.plot(evaluation.frame_numbers, values, label=name, markersize=4, **LINES[name])
            axes.set(title=title, xlabel="frame")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def training_chart(kind: str, rows: list[dict[str, Any]]) -> Figure:
    """The metrics of a training run of ``kind`` against its steps, and its learning rate. ``rows``: metrics.jsonl."""
    panels = PANELS.get(kind, {"loss": "loss"})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.7), layout="constrained")
        axes_of = figure.subplots(1, len(panels) + 1, width_ratios=[3] * len(panels) + [1.5])
        for axes, (metric, title) in zip(axes_of, panels.items(), strict=False):
            _training_line(axes, *_series(rows, "train", metric))
            steps, values = _series(rows, "val", metric)
            axes.plot(steps, values, color=VALIDATION, marker="o", markersize=4, linewidth=1, label="held out")
            axes.set(title=title, xlabel="step")
            axes.set_xlim(left=0)
            _legend_of_what_is_there(axes)
        steps, values = _series(rows, "train", "lr")
        axes_of[-1].plot(steps, values, color=INK, linewidth=1)
        axes_of[-1].set(title="learning rate", xlabel="step")
        axes_of[-1].yaxis.set_major_formatter("{x:.2g}")
    return figure


def as_svg(figure: Figure, salt: str) -> str:
    """The <svg> element for a page. ``salt`` must differ between the charts of a page: it is in their ids."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _series(rows: list[dict[str, Any]], split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[metric]) for row in rows if row["split"] == split and metric in row]
    return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)


def _training_line(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Every value faint, and a moving average over a fortieth of the run."""
    width = max(1, len(steps) // 40)
    every = slice(None, None, max(1, len(steps) // MOST_POINTS))
    axes.plot(steps[every], values[every], color=TRAIN, linewidth=0.8, alpha=0.35 if width > 1 else 1)
    if len(steps):
        smooth = [np.convolve(x, np.full(width, 1 / width), mode="valid")[every] for x in (steps, values)]
        axes.plot(*smooth, color=TRAIN, linewidth=1.6, label="training")


def _legend_of_what_is_there(axes: Axes) -> None:
    lines = [line for line in axes.lines if len(line.get_xdata()) and not line.get_label().startswith("_")]
    axes.legend(lines, [line.get_label() for line in lines])
