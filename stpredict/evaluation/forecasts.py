"""What a forecast job wrote to ``samples/``: given, true and predicted frames, and what they mean. Torch-free.

    given.npy       (n, t_in, h, w, c)    what the forecaster was given
    truth.npy       (n, t_out, h, w, c)   what followed
    prediction.npy  (n, t_out, h, w, c)   float32, not clipped
    index.json      ForecastIndex

Values are in physical units where the data are a field (float32 throughout), in grey levels 0 to 255 where they are
frames of video (given and truth uint8). Nothing is scaled as the model saw it.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.errors import UsageError
from stpredict.run import Run

ARRAYS = ("given", "truth", "prediction")
AGAIN = "run the forecast job again"
GREY_LEVELS = 255.0


class ForecastIndex(BaseModel):
    """Contents of index.json. ``keys`` name the samples of the arrays, in order; ``channels``, ``units``, ``offset``
    and ``scale`` have one entry per channel: the model saw (x - offset) / scale."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["forecast"] = "forecast"
    keys: list[str] = Field(min_length=1)
    data: Literal["frames", "field"]  # uint8 video, or physical values in float32
    channels: list[str] = Field(min_length=1)  # names: grey; red, green, blue; t2m, …
    units: list[str]  # K; "" where it is not known, and of frames
    offset: list[float]
    scale: list[float]
    latitudes: list[float] | None = None  # degrees north of each row of the grid
    times: list[datetime] | None = None  # ISO text in the file: of each sample's first *predicted* frame
    interval_h: float | None = Field(None, gt=0)  # hours from one frame to the next
    seen_h: float | None = Field(None, ge=0)  # hours from the first given frame to the last, where not multiples
    leads_h: list[float] | None = None  # of each predicted frame, hours after the last given one, where not multiples
    forecaster: str  # as its config calls it: simvp, gsta, …
    forecaster_step: int = Field(ge=0)  # steps of its training
    input_frames: int = Field(ge=1)
    output_frames: int = Field(ge=1)
    split: str | None = None  # of the shards: test or val
    seconds_per_sample: float | None = Field(None, gt=0)  # of the forward pass alone

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in ("units", "offset", "scale")}
        if set(lengths.values()) != {len(self.channels)}:
            raise ValueError(f"{len(self.channels)} channels, but {lengths}")
        if min(self.scale) <= 0:
            raise ValueError(f"scale {min(self.scale)}: it must be above 0")
        if self.times is not None and len(self.times) != len(self.keys):
            raise ValueError(f"{len(self.keys)} keys, but {len(self.times)} times")
        if self.leads_h is not None and len(self.leads_h) != self.output_frames:
            raise ValueError(f"{self.output_frames} output frames, but {len(self.leads_h)} leads_h")
        return self

    @property
    def leads(self) -> list[float] | None:
        """Hours from the last given frame to each predicted one; None where the data know no hours."""
        if self.leads_h is not None or self.interval_h is None:
            return self.leads_h
        return [self.interval_h * number for number in range(1, self.output_frames + 1)]

    def valid_times(self, sample: int) -> list[datetime] | None:
        """Of the predicted frames of one sample; None where the data know no times."""
        if self.times is None or self.leads is None:
            return None
        return [self.times[sample] + timedelta(hours=lead - self.leads[0]) for lead in self.leads]

    @property
    def origin(self) -> Literal["upper", "lower"]:
        """Where the first row is drawn, as matplotlib calls it: north is up."""
        return "lower" if self.latitudes and self.latitudes[0] < self.latitudes[-1] else "upper"

    @property
    def unit(self) -> str | None:
        """That of all channels; None where they differ, or those of a field's are not known, so that errors of them
        cannot be added up."""
        known = self.data == "frames" or len(self.channels) == 1 or all(self.units)
        return self.units[0] if known and len(set(self.units)) == 1 else None


@dataclass(frozen=True)
class Forecasts:
    """Memory-mapped arrays ``(n, t, h, w, c)``; see the head of this module."""

    index: ForecastIndex
    given: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    where: Path  # the run's samples/, for errors


def is_forecast(run: Run) -> bool:
    """Whether ``run`` is a forecast job's. UsageError where its status.json is damaged."""
    status = run.status()
    return status is not None and status.kind == "forecast"


def read_forecast_index(run: Run) -> ForecastIndex:
    """UsageError where the run has no index.json, or a damaged one."""
    path = run.samples / "index.json"
    try:
        return ForecastIndex.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(f"{path}: not there; finish the forecast job of {run.path} first") from None
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise UsageError(f"{path}: damaged ({what}); {AGAIN}") from None


def read_forecasts(run: Run) -> Forecasts:
    """UsageError where a file is missing or damaged, or they do not fit each other."""
    index = read_forecast_index(run)
    arrays = {name: _load(run.samples / f"{name}.npy") for name in ARRAYS}
    if problem := _problem(index, arrays):
        raise UsageError(f"{run.samples}: {problem}; {AGAIN}")
    return Forecasts(index, **arrays, where=run.samples)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UsageError(f"{path}: not there; finish the forecast job first") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: damaged ({str(error).splitlines()[0]}); {AGAIN}") from None


def _problem(index: ForecastIndex, arrays: dict[str, np.ndarray]) -> str | None:
    stored = np.uint8 if index.data == "frames" else np.float32
    for name, array in arrays.items():
        wanted = np.float32 if name == "prediction" else stored
        frames = index.input_frames if name == "given" else index.output_frames
        if array.dtype != wanted or array.ndim != 5:
            return f"{name}.npy holds {array.dtype} {array.shape}, not {np.dtype(wanted)} (n, t, h, w, c)"
        expected = (len(index.keys), frames, *arrays["truth"].shape[2:4], len(index.channels))
        if array.shape != expected:
            return f"{name}.npy has shape {array.shape}, index.json and truth.npy say {expected}"
    if index.latitudes is not None and len(index.latitudes) != arrays["truth"].shape[2]:
        return f"{len(index.latitudes)} latitudes, {arrays['truth'].shape[2]} rows"
    return None
