"""Charts of a quantizer's analysis: densities of weights, codebook and latents, and feature maps before and after."""

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stpredict.evaluation.charts import STYLE
from stpredict.evaluation.quantizer_analysis import FeatureMaps
from stpredict.evaluation.quantizer_results import Distribution, QuantizerAnalysis

BEFORE, AFTER, NORMAL = "#e08a00", "#3b82f6", "#6b7280"
SHOWN_CHANNELS = 8


def density_chart(analysis: QuantizerAnalysis) -> Figure:
    """Of standardised weights and codes, where the quantizer weighs codes, and of latents before and after it, beside
    a normal distribution."""
    panels = {"latents": {"before": (analysis.before, BEFORE), "after": (analysis.after, AFTER)}}
    if analysis.weights and analysis.codebook:
        panels = {
            "weights": {"W": (analysis.weights, AFTER)},
            "codebook": {"M": (analysis.codebook, AFTER)},
        } | panels
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels) + 0.8, 3), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _densities(axes, lines)
            axes.set(title=f"density of the {title}", xlabel="standard deviations from the mean")
    return figure


def feature_map_chart(maps: FeatureMaps) -> Figure:
    """The first channels of a frame's latents, each standardised as its row is: before the quantizer and after it."""
    count = min(SHOWN_CHANNELS, len(maps.before))
    _, h, w = maps.before.shape
    height = float(np.clip(1.35 * h / w, 0.6, 2.4))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.35 * count + 0.9, 2 * height + 0.9), layout="constrained")
        for row, (name, latents) in zip(
            figure.subplots(2, count, squeeze=False), {"before": maps.before, "after": maps.after}.items(), strict=True
        ):
            z = (latents - latents.mean()) / max(float(latents.std()), 1e-12)
            for channel, axes in enumerate(row):
                image = axes.imshow(z[channel], cmap="viridis", vmin=-3, vmax=3, interpolation="nearest")
                axes.set(title=f"channel {channel + 1}", xticks=[], yticks=[])
            row[0].set_ylabel(name)
            figure.colorbar(image, ax=list(row), shrink=0.9)
    return figure


def _densities(axes: Axes, lines: dict[str, tuple[Distribution, str]]) -> None:
    for name, (found, colour) in lines.items():
        edges = np.array(found.edges)
        axes.stairs(found.density, edges, label=f"{name}: kurtosis {found.kurtosis:.1f}", color=colour)
    middle = (edges[1:] + edges[:-1]) / 2
    axes.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), color=NORMAL, linestyle=":", label="normal")
    axes.set_yscale("log")
    axes.set_ylim(1e-5, None)
    axes.legend()
