"""Reads what a generate job wrote to ``samples/``, and checks that it belongs together. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.errors import UsageError
from stpredict.run import Run

CLIPS = ("truth", "prediction", "reconstruction")


class Speed(BaseModel):
    """How fast one rank, the first, continued its clips, in ``batches`` of at most ``batch_size``; a warm-up before
    them is no part of it. Seconds are summed over the batches: ``sampling_s`` is drawing the tokens, ``whole_s`` also
    tokenizing the given frames and decoding all frames."""

    clips: int
    predicted_frames: int  # of all clips
    batches: int
    batch_size: int
    forward_steps: int  # of the prior, for one batch
    sampling_s: float = Field(gt=0)
    whole_s: float = Field(gt=0)
    device: str

    @property
    def frames_per_s(self) -> float:
        """Predicted frames of this rank per second of sampling tokens."""
        return self.predicted_frames / self.sampling_s

    @property
    def frames_per_s_whole(self) -> float:
        """With tokenizing and decoding."""
        return self.predicted_frames / self.whole_s

    def in_words(self) -> str:
        return (
            f"{self.frames_per_s:.3g} predicted frames/s of one rank, {self.frames_per_s_whole:.3g} with the "
            f"tokenizer: {self.clips} clips in batches of {self.batch_size}, {self.forward_steps} forward passes "
            f"each, on {self.device}, after a warm-up"
        )


class Index(BaseModel):
    """Contents of index.json: ``keys`` name the clips of the arrays, in order. ``speed`` has been written since it is
    measured; older files have none."""

    model_config = ConfigDict(extra="ignore")

    keys: list[str] = Field(min_length=1)
    given_frames: int = Field(ge=0)
    codebook_size: int = Field(ge=1)
    prior_step: int | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Generated:
    """Clips uint8 ``(n, t, h, w, c)``, memory-mapped, and the tokens ``(n, T', H', W')`` of the true ones.

    The first ``index.given_frames`` frames of ``prediction`` are the true ones.
    """

    index: Index
    truth: np.ndarray
    prediction: np.ndarray
    reconstruction: np.ndarray
    truth_tokens: np.ndarray


def read_index(run: Run) -> Index:
    """UsageError where the run has no index.json, or a damaged one."""
    path = run.samples / "index.json"
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(f"{path}: not there; finish the generate job of {run.path} first") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        what = f"{where}: {error.errors()[0]['msg']}".removeprefix(": ")
        raise UsageError(f"{path}: damaged ({what}); run the generate job again") from None


def read_generated(run: Run) -> Generated:
    """UsageError where a file is missing or damaged, or the files do not fit each other."""
    index = read_index(run)
    if not index.given_frames:
        raise UsageError(f"{run.path}: its clips are made from nothing; there is no truth to compare them to")
    arrays = {name: _load(run.samples / f"{name}.npy") for name in (*CLIPS, "truth_tokens")}
    if problem := _problem(index, arrays):
        raise UsageError(f"{run.samples}: {problem}; run the generate job again")
    return Generated(index, **arrays)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UsageError(f"{path}: not there; finish the generate job first") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: damaged ({str(error).splitlines()[0]}); run the generate job again") from None


def _problem(index: Index, arrays: dict[str, np.ndarray]) -> str | None:
    truth, tokens = arrays["truth"], arrays["truth_tokens"]
    for name in CLIPS:
        if arrays[name].dtype != np.uint8 or arrays[name].ndim != 5:
            return f"{name}.npy holds {arrays[name].dtype} {arrays[name].shape}, not uint8 (n, t, h, w, c)"
        if arrays[name].shape != truth.shape:
            return f"{name}.npy has shape {arrays[name].shape}, truth.npy {truth.shape}"
    if not len(index.keys) == len(truth) == len(tokens):
        return f"{len(index.keys)} keys, {len(truth)} clips and tokens of {len(tokens)} clips"
    if index.given_frames >= truth.shape[1]:
        return f"all of the {truth.shape[1]} frames are given, none is predicted"
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < 0 or tokens.max() >= index.codebook_size:
        return f"truth_tokens.npy holds more than token ids below {index.codebook_size}"
    return None
