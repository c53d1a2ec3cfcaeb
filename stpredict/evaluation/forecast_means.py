"""From the values of every frame to the numbers of a method, per lead time and over all, and to paired differences.

A table holds, of n samples, t lead times and c channels: ``square``, ``absolute`` and ``weighted square``
``(n, t, c)``; ``anomalies`` and ``weighted anomalies`` ``(n, t, c, 3)``, the products of anomaly_products; and by the
metric's name what is one number per frame, ``(n, t)``. Torch-free.
"""

from datetime import timedelta

import numpy as np

from stpredict.evaluation.forecast_scores import PREDICTION, Difference, Values
from stpredict.evaluation.forecasts import GREY_LEVELS, ForecastIndex

Table = dict[str, np.ndarray]
COMPARED = ("rmse", "mae", "frame_mse", "frame_mae", "ssim", "psnr")
PER_CHANNEL = ("square", "absolute", "weighted square", "anomalies", "weighted anomalies")


def scaling(index: ForecastIndex) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of each channel for the metrics of scaled values: of frames always [0, 1], as papers print."""
    if index.data == "frames":
        return np.zeros(len(index.channels)), np.full(len(index.channels), GREY_LEVELS)
    return np.array(index.offset), np.array(index.scale)


def means(table: Table, index: ForecastIndex, grid: tuple[int, int]) -> dict[str, Values]:
    """The metrics over all channels; those that mean something of one channel only where there is one."""
    found = _errors(table, index, grid)
    found |= {name: _mean(values) for name, values in table.items() if name not in PER_CHANNEL}
    if len(index.channels) == 1:
        found |= _of_one_channel(table)
    return found


def channel_means(table: Table, index: ForecastIndex, grid: tuple[int, int]) -> dict[str, dict[str, Values]]:
    """The metrics of each channel, where there are several."""
    if len(index.channels) == 1:
        return {}
    found = {}
    for number, channel in enumerate(index.channels):
        own = {name: table[name][:, :, number : number + 1] for name in PER_CHANNEL if name in table}
        about = {name: [getattr(index, name)[number]] for name in ("channels", "units", "offset", "scale")}
        found[channel] = _errors(own, index.model_copy(update=about), grid) | _of_one_channel(own)
    return found


def differences(tables: dict[str, Table], other: str, index: ForecastIndex, grid: tuple[int, int]) -> list[Difference]:
    """Of the prediction from ``other``, paired sample by sample."""
    one, its = (_per_sample(tables[method], index, grid) for method in (PREDICTION, other))
    found = []
    for name in COMPARED:
        if name in one:
            gaps = one[name] - its[name]
            error = standard_error(gaps, blocks(index))
            found.append(Difference(other=other, metric=name, value=float(gaps.mean()), stderr=error))
    return found


def blocks(index: ForecastIndex) -> np.ndarray:
    """Which samples say much the same, by number ``(n,)``: those whose times fall into the same stretch of the length
    of a sample, given frames included, because windows that start soon after each other overlap. Without times every
    sample is its own."""
    if index.times is None or index.leads is None:
        return np.arange(len(index.keys))
    hours = np.array([(time - min(index.times)) / timedelta(hours=1) for time in index.times])
    apart = index.interval_h or 0
    seen = apart * (index.input_frames - 1) if index.seen_h is None else index.seen_h
    return np.floor(hours / (seen + index.leads[-1] + apart)).astype(int)


def standard_error(values: np.ndarray, of_block: np.ndarray) -> float | None:
    """Of the mean of ``values`` ``(n,)``, from how much the blocks' sums differ from what the mean lets expect; None
    where there is but one block. With a block for each value it is the usual deviation / root(n)."""
    sums = np.bincount(np.unique(of_block, return_inverse=True)[1], values - values.mean())
    if len(sums) < 2:
        return None
    return float(np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(values))


def _per_sample(table: Table, index: ForecastIndex, grid: tuple[int, int]) -> Table:
    """``(n,)`` for each of COMPARED that there is: its mean is the metric over all. The RMSE, which is no mean over
    samples, is linear in the samples' MSEs to first order (delta method): rmse + (mse_i - mse) / (2 rmse)."""
    frames = _frame_errors(table, index, grid) | {name: table[name] for name in COMPARED if name in table}
    found = {name: values.mean(1) for name, values in frames.items()}
    if "mse" in found:
        mse = found["mse"]
        root = np.sqrt(mse.mean())
        found["rmse"] = root + (mse - mse.mean()) / (2 * root) if root else np.zeros_like(mse)
    return found


def _frame_errors(table: Table, index: ForecastIndex, grid: tuple[int, int]) -> Table:
    """``(n, t)`` of the errors that are means over frames."""
    _, scale = scaling(index)
    points = grid[0] * grid[1]
    found = {
        "frame_mse": (points * table["square"] / scale**2).sum(-1),
        "frame_mae": (points * table["absolute"] / scale).sum(-1),
    }
    if index.unit is not None:
        found |= {"mse": table["square"].mean(-1), "mae": table["absolute"].mean(-1)}
    return found


def _errors(table: Table, index: ForecastIndex, grid: tuple[int, int]) -> dict[str, Values]:
    found = {name: _mean(values) for name, values in _frame_errors(table, index, grid).items()}
    if "mse" in found:
        found["rmse"] = _root(found["mse"])
    return found


def _of_one_channel(table: Table) -> dict[str, Values]:
    found = {}
    if "weighted square" in table:
        squares = table["weighted square"][..., 0]
        found = {"latitude_rmse": _mean(np.sqrt(squares)), "latitude_rmse_pooled": _root(_mean(squares))}
    if "anomalies" in table:
        found["acc"] = _mean(_correlation(table["anomalies"][:, :, 0]))
    if "weighted anomalies" in table:
        products = table["weighted anomalies"][:, :, 0]
        found["latitude_acc"] = _mean(_correlation(products))
        found["latitude_acc_pooled"] = Values(
            overall=_number(_correlation(products.sum((0, 1)))),
            per_lead=[_number(value) for value in _correlation(products.sum(0))],
        )
    return found


def _correlation(products: np.ndarray) -> np.ndarray:
    """From po, pp and oo on the last axis; nan where one of the anomalies is nothing."""
    po, pp, oo = np.moveaxis(products, -1, 0)
    norm = np.sqrt(pp * oo)
    return np.divide(po, norm, out=np.full(po.shape, np.nan), where=norm > 0)


def _mean(values: np.ndarray) -> Values:
    """Of ``(n, t)``."""
    return Values(overall=_number(values.mean()), per_lead=[_number(value) for value in values.mean(0)])


def _root(values: Values) -> Values:
    return Values(overall=values.overall**0.5, per_lead=[value**0.5 for value in values.per_lead])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
