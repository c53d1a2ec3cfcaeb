"""Forecast runs as their job leaves them, made by hand: something that moves, and persistence with noise."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from stpredict.evaluation.forecasts import ForecastIndex
from stpredict.run import Run

T_IN, T_OUT = 3, 4


def write_forecasts(path: Path, given, truth, prediction, **index) -> Run:
    """Fills samples/ of the run at ``path``, and its status.json. ``index``: what differs from the defaults."""
    run = Run(path)
    run.samples.mkdir(parents=True, exist_ok=True)
    for name, array in {"given": given, "truth": truth, "prediction": prediction}.items():
        np.save(run.samples / f"{name}.npy", array)
    index = index_of(given, truth, **index)
    (run.samples / "index.json").write_text(index.model_dump_json())
    run.update_status(kind="forecast", state="done")
    return run


def index_of(given, truth, **index) -> ForecastIndex:
    frames, c = truth.dtype == np.uint8, truth.shape[-1]
    defaults = {
        "keys": [f"sample-{number}" for number in range(len(truth))],
        "data": "frames" if frames else "field",
        "channels": [f"channel {number}" for number in range(c)],
        "units": ["grey levels" if frames else "K"] * c,
        "offset": [0.0] * c,
        "scale": [255.0 if frames else 1.0] * c,
        "forecaster": "made up",
        "forecaster_step": 30,
        "input_frames": given.shape[1],
        "output_frames": truth.shape[1],
    }
    return ForecastIndex(**defaults | index)


def video(n: int = 5, size: int = 20, channels: int = 1, noise: float = 20.0, seed: int = 0):
    """A square that moves, and persistence with noise as its forecast: given and truth uint8, prediction float32."""
    rng = np.random.default_rng(seed)
    clips = np.full((n, T_IN + T_OUT, size, size, channels), 10, np.uint8)
    for clip in clips:
        (y, x), level = rng.integers(0, 6, 2), rng.integers(100, 255, channels)
        for t, frame in enumerate(clip):
            frame[y + t : y + t + 6, x + t : x + t + 6] = level
    given, truth = clips[:, :T_IN], clips[:, T_IN:]
    prediction = given[:, -1:] + rng.normal(0, noise, truth.shape)
    return given, truth, prediction.astype(np.float32)


def field(n: int = 5, h: int = 6, w: int = 8, channels: int = 1, noise: float = 0.5, seed: int = 0):
    """A day's rise and fall with weather on top, hourly from the first of the year, windows of stride 1; a forecast
    that has ``noise`` as its only error."""
    rng = np.random.default_rng(seed)
    hours = np.arange(n + T_IN + T_OUT - 1)
    day = 5 * np.sin(2 * np.pi * hours / 24)[:, None, None, None]
    steps = 280 + day + rng.normal(0, 1, (len(hours), h, w, channels)).cumsum(0)
    windows = np.stack([steps[k : k + T_IN + T_OUT] for k in range(n)]).astype(np.float32)
    given, truth = windows[:, :T_IN], windows[:, T_IN:]
    return given, truth, (truth + rng.normal(0, noise, truth.shape)).astype(np.float32)


def hourly(n: int, first: datetime = datetime(2020, 1, 1)) -> dict:
    """Of ``index``, for the windows of ``field``."""
    return {"times": [first + timedelta(hours=T_IN + k) for k in range(n)], "interval_h": 1.0}
