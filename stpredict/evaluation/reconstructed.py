"""What a reconstruct job wrote, and what is measured of it. Torch-free.

Every mean is over clips and all frames of a *per-frame* value, with pixels in [0, 1].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.errors import UsageError
from stpredict.run import Run

ARRAYS = ("truth", "reconstruction", "truth_tokens")
AGAIN = "run the reconstruct job again"


class ReconstructedIndex(BaseModel):
    """Contents of index.json: ``keys`` name the clips of the arrays, in order."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["reconstructed"] = "reconstructed"
    keys: list[str] = Field(min_length=1)
    codebook_size: int = Field(ge=1)
    tokenizer_step: int


@dataclass(frozen=True)
class Reconstructed:
    """Clips uint8 ``(n, t, h, w, c)``, memory-mapped, and the tokens ``(n, T', H', W')`` of the true ones."""

    index: ReconstructedIndex
    truth: np.ndarray
    reconstruction: np.ndarray
    truth_tokens: np.ndarray


class Reconstruction(BaseModel):
    """Contents of metrics.json. The best constant frame shows each clip's mean colour throughout."""

    kind: Literal["reconstruction"] = "reconstruction"
    clips: int
    frames: int
    tokenizer_step: int
    psnr: float
    ssim: float
    mse: float
    lpips: float | None = None  # where weights were given
    psnr_per_frame: list[float]
    constant_frame_psnr: float
    codes_used: int
    codebook_size: int
    codebook_perplexity: float
    codebook_entropy_bits: float
    tokens: int

    def in_words(self) -> str:
        lpips = f", LPIPS {self.lpips:.4f}" if self.lpips is not None else ""
        return (
            f"Reconstruction of {self.clips} clips of {self.frames} frames, after {self.tokenizer_step:,} steps: PSNR "
            f"{self.psnr:.2f} dB (best constant frame {self.constant_frame_psnr:.2f}), SSIM {self.ssim:.4f}{lpips}; "
            f"{self.codes_used:,} of {self.codebook_size:,} codes in use, perplexity {self.codebook_perplexity:,.1f}, "
            f"entropy {self.codebook_entropy_bits:.2f} bits"
        )


def is_reconstructed(run: Run) -> bool:
    """Whether ``run`` is a reconstruct job's. UsageError where its status.json is damaged."""
    status = run.status()
    return status is not None and status.kind == "reconstruct"


def read_reconstructed_index(run: Run) -> ReconstructedIndex:
    """UsageError where the run has no index.json, or a damaged one."""
    path = run.samples / "index.json"
    try:
        return ReconstructedIndex.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(f"{path}: not there; finish the reconstruct job of {run.path} first") from None
    except ValidationError as error:
        raise UsageError(f"{path}: damaged ({error.errors()[0]['msg']}); {AGAIN}") from None


def read_reconstructed(run: Run) -> Reconstructed:
    """UsageError where a file is missing or damaged, or they do not fit each other."""
    index = read_reconstructed_index(run)
    try:
        arrays = {name: np.load(run.samples / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{run.samples}: {str(error).splitlines()[0]}; {AGAIN}") from None
    truth, tokens = arrays["truth"], arrays["truth_tokens"]
    if arrays["reconstruction"].shape != truth.shape or not len(index.keys) == len(truth) == len(tokens):
        raise UsageError(f"{run.samples}: the arrays are not of the same {len(index.keys)} clips; {AGAIN}")
    if tokens.max() >= index.codebook_size:
        raise UsageError(f"{run.samples}: truth_tokens.npy holds ids from {index.codebook_size} on; {AGAIN}")
    return Reconstructed(index, **arrays)


def read_metrics(path: Path) -> Reconstruction | None:
    """Of metrics.json, where it is of a reconstruction; else None."""
    try:
        return Reconstruction.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
