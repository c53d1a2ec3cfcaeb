"""Errors of forecasts, frame by frame: what every number of a forecast's evaluation is made of.

Arrays are ``(b, t, h, w, c)``; a value per frame and channel is ``(b, t, c)``, one per frame ``(b, t)``, all float64.
docs/forecasting_metrics.md says which paper prints which; forecast_scores.py makes the means.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from stpredict.evaluation.frame_metrics import SSIM_WINDOW, frame_psnr

WRAPPED_LEVELS = 256


def square_errors(prediction: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean squared error of every frame and channel. ``weights`` ``(h,)``, of mean 1: of the rows."""
    return _over_grid(np.square(_difference(prediction, truth)), weights)


def absolute_errors(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error of every frame and channel."""
    return _over_grid(np.abs(_difference(prediction, truth)), None)


def latitude_weights(latitudes: list[float]) -> np.ndarray:
    """cos(latitude) over its mean: the area that a row's points stand for (WeatherBench, Rasp et al. 2020).
    Degrees; float64 ``(h,)``."""
    weights = np.cos(np.deg2rad(np.asarray(latitudes, dtype=np.float64)))
    return weights / weights.mean()


def anomaly_products(
    prediction: np.ndarray, truth: np.ndarray, climatology: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Of the anomalies p and o of prediction and truth from the climatology: the means over the grid of po, pp and oo,
    ``(3, b, t, c)``. An anomaly correlation is po / root(pp oo); no mean is taken off the anomalies."""
    p, o = _difference(prediction, climatology), _difference(truth, climatology)
    return np.stack([_over_grid(product, weights) for product in (p * o, p * p, o * o)])


def psnr(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """-10 log10 of every frame's mean squared error over pixels and channels, in dB: ``(b, t)``. Values in [0, 1];
    the prediction is clipped to that. An exact frame counts as frame_metrics.frame_psnr says."""
    mse = square_errors(prediction.clip(0, 1), truth).mean(-1)
    return frame_psnr(torch.from_numpy(mse)).numpy()


def psnr_wrapped(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR as SimVP's first code and E3D-LSTM's compute it: *wrong*, and too high; ``(b, t)``, of values in [0, 1].

    Pixels become uint8, and difference and square wrap around at 256: errors of 16 grey levels count as none. For
    comparison with papers that print such numbers, and for nothing else.
    """
    levels = [(x.astype(np.float32).clip(0, 1) * np.float32(255)).astype(np.uint8) for x in (prediction, truth)]
    difference = levels[0].astype(np.int64) - levels[1]
    mse = (np.square(difference) % WRAPPED_LEVELS).mean(axis=(2, 3, 4)) / 255**2
    return frame_psnr(torch.from_numpy(mse)).numpy()


def ssim(prediction: np.ndarray, truth: np.ndarray, data_ranges: tuple[float, ...] = (1.0,)) -> list[np.ndarray]:
    """Structural similarity of every frame, ``(b, t)``, for each of ``data_ranges``. Values in [0, 1], to which the
    prediction is clipped.

    The mean over channels and the windows of 7x7 that lie inside the frame (Wang et al. 2004, eq. 13), with *sample*
    covariances, 1/48 times the sum over a window's 49 pixels, as scikit-image computes it. frame_metrics.frame_ssim
    has population covariances, 1/49.
    """
    b, _, h, w, _ = truth.shape
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of {SSIM_WINDOW}x{SSIM_WINDOW} pixels at least, got {h}x{w}")
    x, y = (_as_images(array).clamp(0, 1) for array in (prediction, truth))
    pixels = SSIM_WINDOW**2
    mean_x, mean_y = _window_means(x), _window_means(y)
    sample = pixels / (pixels - 1)
    products = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    covariance = sample * (_window_means(x * y) - products)
    variances = sample * (_window_means(x.square() + y.square()) - squares)
    found = []
    for data_range in data_ranges:
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        similar = (2 * products + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
        found.append(reduce(similar, "(b t) c h w -> b t", "mean", b=b).numpy())
    return found


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one.astype(np.float64) - other


def _over_grid(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    if weights is None:
        return reduce(values, "b t h w c -> b t c", "mean")
    return np.einsum("bthwc,h->btc", values, weights) / (values.shape[2] * values.shape[3])


def _as_images(array: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(np.asarray(array, dtype=np.float64)), "b t h w c -> (b t) c h w")


def _window_means(images: Tensor) -> Tensor:
    """Row by row, then column by column: 14 additions per pixel in place of 49."""
    return F.avg_pool2d(F.avg_pool2d(images, (SSIM_WINDOW, 1), stride=1), (1, SSIM_WINDOW), stride=1)
