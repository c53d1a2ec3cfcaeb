"""Measures forecasts beside their yardsticks, some samples at a time; the results are described in forecast_scores.py.

*Persistence* repeats the last given frame: the papers' row "copying". *Climatology* is what is usual at the place, the
hour and the day (climatology.py). All methods are measured on the same samples, so that differences are paired. What
is kept of a frame is a number per metric and channel: a test set of any length needs no memory for its frames.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from stpredict.evaluation.climatology import Climatology
from stpredict.evaluation.forecast_means import Table, channel_means, differences, means, scaling
from stpredict.evaluation.forecast_metrics import (
    absolute_errors,
    anomaly_products,
    latitude_weights,
    psnr,
    psnr_wrapped,
    square_errors,
    ssim,
)
from stpredict.evaluation.forecast_scores import (
    CLIMATOLOGY,
    PERSISTENCE,
    PREDICTION,
    ForecastEvaluation,
    MethodScores,
)
from stpredict.evaluation.forecasts import ForecastIndex, Forecasts
from stpredict.evaluation.frame_metrics import SSIM_WINDOW
from stpredict.losses.config import LpipsConfig
from stpredict.losses.perceptual import Lpips

CHUNK_VALUES = 2**20  # values of the truth measured at once; float64, and some ten arrays of them
TOLERANCE = 1e-6  # of scaled values that count as within [0, 1]


@dataclass
class ErrorMaps:
    """Of the prediction, over samples and lead times: mean error and root of the mean squared error, ``(h, w, c)`` in
    physical units."""

    bias: np.ndarray
    rmse: np.ndarray


@dataclass
class _Sums:
    error: np.ndarray | float = 0.0
    square: np.ndarray | float = 0.0
    frames: int = 0

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        error = prediction.astype(np.float64) - truth
        self.error = self.error + error.sum((0, 1))
        self.square = self.square + np.square(error).sum((0, 1))
        self.frames += error.shape[0] * error.shape[1]


@dataclass
class _Measuring:
    """How a chunk is measured. ``images``: whether values are an image's, so far; PSNR and SSIM are of images."""

    index: ForecastIndex
    images: bool
    ssim: bool
    weights: np.ndarray | None
    lpips: Lpips | None
    lpips_name: str
    tables: dict[str, list[Table]] = field(default_factory=dict)

    def add(self, method: str, prediction: np.ndarray, truth: np.ndarray, usual: np.ndarray | None) -> None:
        found: Table = {
            "square": square_errors(prediction, truth),
            "absolute": absolute_errors(prediction, truth),
        }
        if self.weights is not None:
            found["weighted square"] = square_errors(prediction, truth, self.weights)
        if usual is not None:
            found["anomalies"] = rearrange(anomaly_products(prediction, truth, usual), "p b t c -> b t c p")
            if self.weights is not None:
                products = anomaly_products(prediction, truth, usual, self.weights)
                found["weighted anomalies"] = rearrange(products, "p b t c -> b t c p")
        if self.images:
            found |= self._of_images(*(self.scaled(x) for x in (prediction, truth)))
        self.tables.setdefault(method, []).append(found)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """In [0, 1] where they are an image's."""
        offset, scale = scaling(self.index)
        return (values.astype(np.float64) - offset) / scale

    def _of_images(self, prediction: np.ndarray, truth: np.ndarray) -> Table:
        found = {"psnr": psnr(prediction, truth), "psnr_wrapped": psnr_wrapped(prediction, truth)}
        if self.ssim:
            found |= dict(zip(("ssim", "ssim_range_2"), ssim(prediction, truth, (1.0, 2.0)), strict=True))
        if self.lpips:
            videos = (torch.from_numpy(2 * x.clip(0, 1) - 1) for x in (prediction, truth))
            with torch.no_grad():
                distances = self.lpips(*(rearrange(x.float(), "b t h w c -> b c t h w") for x in videos))
            found[self.lpips_name] = distances.double().numpy()
        return found


def evaluate_forecasts(
    found: Forecasts,
    others: Mapping[str, Forecasts] | None = None,
    climatology: Climatology | None = None,
    lpips: LpipsConfig | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ForecastEvaluation, ErrorMaps]:
    """Measures all samples of ``found``, and of ``others`` by their names; calls ``report(samples done, samples)``.

    UsageError where the others are of other samples, a value is infinite or not a number, the climatology is of another
    grid or time, or LPIPS cannot be measured.
    """
    others, index = dict(others or {}), found.index
    n, t, h, w, c = found.truth.shape
    check_forecasts(found, others, lpips)
    how = _measuring(found, lpips)
    sums = _Sums()
    size = max(1, CHUNK_VALUES // (t * h * w * c))
    for start in range(0, n, size):
        here = slice(start, min(start + size, n))
        truth = _finite(found, "truth", here)
        if how.images and index.data == "field" and _leaves_unit_interval(how.scaled(truth)):
            how.images = False
        usual = _usual(climatology, index, here, truth.shape)
        for method, prediction in _methods(found, others, here, truth, usual):
            how.add(method, prediction, truth, usual)
            if method == PREDICTION:
                sums.add(prediction, truth)
        report(here.stop, n)
    tables = {method: _joined(parts, how.images) for method, parts in how.tables.items()}
    evaluation = _summary(found, others, climatology, how, tables, (h, w))
    bias, square = sums.error / sums.frames, sums.square / sums.frames
    return evaluation, ErrorMaps(bias, np.sqrt(square))


def check_forecasts(found: Forecasts, others: Mapping[str, Forecasts], lpips: LpipsConfig | None) -> None:
    """What is known before anything is measured. UsageError where the others are of other samples, or LPIPS is not of
    such frames."""
    for name, other in others.items():
        _check_same(found, name, other)
    if lpips:
        if found.index.data == "field":
            raise UsageError(f"lpips: of frames of video; {found.where} holds a field; leave it out")
        _, t, h, w, c = found.truth.shape
        lpips.check_clip(ClipConfig(frames=t, size=(h, w), channels=c), "lpips")


def _measuring(found: Forecasts, lpips: LpipsConfig | None) -> _Measuring:
    index, (h, w) = found.index, found.truth.shape[2:4]
    return _Measuring(
        index,
        images=True,
        ssim=min(h, w) >= SSIM_WINDOW,
        weights=latitude_weights(index.latitudes) if index.latitudes else None,
        lpips=Lpips(lpips, "lpips") if lpips else None,
        lpips_name=f"lpips_{lpips.network}" if lpips else "",
    )


def _methods(
    found: Forecasts, others: Mapping[str, Forecasts], here: slice, truth: np.ndarray, usual: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    yield PREDICTION, _finite(found, "prediction", here)
    for name, other in others.items():
        for key, one, its in zip(found.index.keys[here], truth, other.truth[here], strict=True):
            if not np.array_equal(one, its):
                raise UsageError(f"others.{name}: {other.where}: the truth of {key} is another; forecast it again")
        yield name, _finite(other, "prediction", here)
    last = _finite(found, "given", here)[:, -1:]
    yield PERSISTENCE, np.broadcast_to(last, truth.shape)
    if usual is not None:
        yield CLIMATOLOGY, usual


def _usual(
    climatology: Climatology | None, index: ForecastIndex, here: slice, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The climatology of a chunk's true frames."""
    if climatology is None:
        return None
    climatology.check(shape[2:], index)
    return np.stack([climatology.of(index.valid_times(n), shape[1]) for n in range(here.start, here.stop)])


def _check_same(found: Forecasts, name: str, other: Forecasts) -> None:
    if other.truth.shape != found.truth.shape or other.index.keys != found.index.keys:
        which = next((key for key in other.index.keys if key not in found.index.keys), None)
        what = f"{which!r} is none of them" if which else f"its truth is {other.truth.shape}, not {found.truth.shape}"
        if which is None and other.truth.shape == found.truth.shape:
            what = "they come in another order"
        raise UsageError(
            f"others.{name}: {other.where} is not of the samples of {found.where} ({what}); "
            "make both forecasts of the same data, with as many output frames"
        )


def _finite(found: Forecasts, name: str, here: slice) -> np.ndarray:
    values = np.asarray(getattr(found, name)[here])
    if not np.isfinite(values).all():
        row = next(n for n, sample in enumerate(values) if not np.isfinite(sample).all())
        count = int((~np.isfinite(values[row])).sum())
        raise UsageError(
            f"{found.where}/{name}.npy: {count} values of {found.index.keys[here.start + row]} are infinite or not a "
            "number; find out why before anything is measured"
        )
    return values


def _leaves_unit_interval(scaled: np.ndarray) -> bool:
    return bool(scaled.min() < -TOLERANCE or scaled.max() > 1 + TOLERANCE)


def _joined(parts: list[Table], images: bool) -> Table:
    names = parts[-1].keys() if images else [name for name in parts[-1] if parts[-1][name].ndim > 2]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _summary(
    found: Forecasts,
    others: Mapping[str, Forecasts],
    climatology: Climatology | None,
    how: _Measuring,
    tables: dict[str, Table],
    grid: tuple[int, int],
) -> ForecastEvaluation:
    index, runs = found.index, {PREDICTION: found, **others}
    methods = {
        method: MethodScores(
            metrics=means(table, index, grid),
            channels=channel_means(table, index, grid),
            **(_about(runs[method].index) if method in runs else {}),
        )
        for method, table in tables.items()
    }
    return ForecastEvaluation(
        data=index.data,
        samples=len(index.keys),
        split=index.split,
        input_frames=index.input_frames,
        output_frames=index.output_frames,
        channels=index.channels,
        units=["grey levels"] * len(index.units) if index.data == "frames" else index.units,
        leads_h=index.leads,
        methods=methods,
        differences=[d for other in tables if other != PREDICTION for d in differences(tables, other, index, grid)],
        headline="rmse" if index.data == "field" and index.unit is not None else "frame_mse",
        climatology=climatology.kind if climatology else None,
        notes=_notes(index, how),
    )


def _about(index: ForecastIndex) -> dict[str, object]:
    return {
        "forecaster": index.forecaster,
        "step": index.forecaster_step,
        "seconds_per_sample": index.seconds_per_sample,
    }


def _notes(index: ForecastIndex, how: _Measuring) -> list[str]:
    """What was left out, and why."""
    notes = []
    if not how.images:
        notes.append("no PSNR, no SSIM: scaled values leave [0, 1], they are no image's")
    elif not how.ssim:
        notes.append(f"no SSIM: frames are smaller than its window of {SSIM_WINDOW}x{SSIM_WINDOW}")
    if index.data == "field":
        if index.unit is None:
            why = "their units differ or are not known"
            notes.append(f"no RMSE over all channels: {why}; frame MSE, of scaled values, says who wins")
        if not index.latitudes:
            notes.append("nothing is weighted by latitude: the data name no latitudes")
    return notes
