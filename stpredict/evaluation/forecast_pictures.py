"""Forecasts for people to look at: truth, prediction and error, one lead time beside the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image

from stpredict.evaluation.charts import STYLE
from stpredict.evaluation.forecasts import ForecastIndex
from stpredict.evaluation.pictures import class_grid, write_side_by_side

COLUMNS = 8  # lead times of a picture, at most
MOST_CHANNELS = 4  # of a field's picture
SMALL = 96  # pixels: smaller frames are drawn twice as large


def write_forecast_pictures(
    folder: Path, index: ForecastIndex, given: np.ndarray, truth: np.ndarray, prediction: np.ndarray, count: int
) -> None:
    """NUMBER_KEY.png of the first ``count`` samples of arrays ``(n, t, h, w, c)``; of video also .gif and .mp4: the
    given frames and what followed, beside what was predicted."""
    if not count:
        return
    for number, key in enumerate(index.keys[:count]):
        sample = given[number], truth[number], prediction[number]
        path = folder / f"{number:03d}_{key}.png"
        if index.data == "frames" and truth.shape[-1] in (1, 3):
            Image.fromarray(frame_strip(*sample)).save(path)
        else:
            strip = field_strip(*sample, index.channels, index.units, lead_names(index), index.origin)
            strip.savefig(path, dpi=100)
    if index.data == "frames" and truth.shape[-1] in (1, 3):
        before = np.asarray(given[:count])
        clips = {"truth": truth[:count], "prediction": as_pixels(prediction[:count])}
        joined = {name: np.concatenate([before, after], axis=1) for name, after in clips.items()}
        write_side_by_side(folder, index.keys[:count], joined)


def field_strip(
    given: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    channels: Sequence[str],
    units: Sequence[str],
    leads: Sequence[str],
    origin: Literal["upper", "lower"] = "upper",
) -> Figure:
    """Fields ``(t, h, w, c)`` of one sample: for each channel the truth, the prediction and the error in rows, the last
    given frame and the lead times in columns. Truth and prediction share a scale, whose ends are the truth's.
    ``origin``: where the first row is."""
    shown = _columns(len(truth))
    channels = list(channels)[:MOST_CHANNELS]
    _, h, w, _ = truth.shape
    wide = 1.3
    high = float(np.clip(wide * h / w, 0.5, 2.6))
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.titlelocation": "center"}):
        size = (wide * (len(shown) + 1) + 1.4, (3 * high + 0.5) * len(channels) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(3 * len(channels), len(shown) + 1, squeeze=False)
        for number, (channel, unit) in enumerate(zip(channels, units, strict=False)):
            rows = grid[3 * number : 3 * number + 3]
            last, true, made = (
                x[..., number].astype(np.float64) for x in (given[-1:], truth[shown], prediction[shown])
            )
            seen = np.concatenate([last, true])
            levels = {"origin": origin, "cmap": "viridis", "vmin": seen.min(), "vmax": seen.max()}
            most = float(np.abs(made - true).max()) or 1.0
            errors = {"origin": origin, "cmap": "RdBu_r", "vmin": -most, "vmax": most}
            lines = (("truth", seen, levels), ("prediction", made, levels), ("error", made - true, errors))
            for axes, (name, frames, colours) in zip(rows, lines, strict=True):
                _row(figure, axes, f"{channel}\n{name}", frames, colours, unit)
            rows[0][0].set_title("given")
            for axes, lead in zip(rows[0][1:], shown, strict=True):
                axes.set_title(leads[lead])
    return figure


def frame_strip(given: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Frames ``(t, h, w, c)`` of one sample, of 1 or 3 channels in grey levels: what was given, truth, prediction and
    absolute error in rows under each other, uint8 ``(h', w', 3)``."""
    shown = _columns(len(truth))
    error = as_pixels(np.abs(prediction[shown].astype(np.float64) - truth[shown]))
    before = np.full((len(shown), *truth.shape[1:]), 255, np.uint8)
    last = given[-len(shown) :]
    before[len(shown) - len(last) :] = last
    rows = {"given": before, "truth": truth[shown], "prediction": as_pixels(prediction[shown]), "error": error}
    scale = 1 if min(truth.shape[1:3]) >= SMALL else 2
    larger = {name: frames.repeat(scale, axis=1).repeat(scale, axis=2) for name, frames in rows.items()}
    picture = class_grid({name: list(rearrange(frames, "t h w c -> t 1 h w c")) for name, frames in larger.items()})
    return picture[0]


def as_pixels(values: np.ndarray) -> np.ndarray:
    """Grey levels of any type, rounded and clipped to uint8."""
    return np.asarray(values, dtype=np.float64).round().clip(0, 255).astype(np.uint8)


def lead_names(index: ForecastIndex) -> list[str]:
    """``+6 h``, or the number of the predicted frame, from 1."""
    if index.leads is None:
        return [str(number) for number in range(1, index.output_frames + 1)]
    return [f"+{lead:g} h" for lead in index.leads]


def _columns(frames: int) -> np.ndarray:
    """Which lead times are drawn: from the first to the last."""
    return np.linspace(0, frames - 1, min(COLUMNS, frames)).round().astype(int)


def _row(figure: Figure, axes: np.ndarray, name: str, frames: np.ndarray, colours: dict, unit: str) -> None:
    """Frames ``(k, h, w)`` in the last k of ``axes``, and their colour bar."""
    for empty in axes[: len(axes) - len(frames)]:
        empty.set_axis_off()
    for one, frame in zip(axes[len(axes) - len(frames) :], frames, strict=True):
        image = one.imshow(frame, interpolation="nearest", **colours)
        one.set(xticks=[], yticks=[])
    first = axes[len(axes) - len(frames)]
    first.set_ylabel(name)
    figure.colorbar(image, ax=list(axes), shrink=0.9, label=unit, pad=0.01)
