"""What an evaluate job writes to metrics.json, and what it says in one sentence. Torch-free.

Every mean is over clips and frames of a *per-frame* value: ``psnr`` is the mean of the frames' PSNRs, not the PSNR of
their mean error. Pixels are in [0, 1]; PSNR is in dB.
"""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import UsageError
from stpredict.evaluation.generated import Speed


class PerFrame(BaseModel):
    """Means over clips, one value per predicted frame; the first belongs to the first frame after the given ones."""

    psnr: list[float]
    ssim: list[float]
    mse: list[float]


class Scores(BaseModel):
    """Means over clips and predicted frames."""

    psnr: float
    ssim: float
    mse: float
    per_frame: PerFrame


class TokenizerScores(BaseModel):
    """Reconstruction over *all* frames, given ones too, and the use of the codebook by the same clips.

    The best constant frame shows a single colour throughout: each clip's mean colour, which of all colours has the
    least squared error on that clip.
    """

    psnr: float
    constant_frame_psnr: float
    gain_db: float  # psnr - constant_frame_psnr
    codes_used: int  # distinct codes
    codebook_size: int
    codebook_perplexity: float  # exp of the entropy of the codes' shares
    tokens: int  # tokens of all clips


class Evaluation(BaseModel):
    """Contents of metrics.json."""

    clips: int
    given_frames: int
    predicted_frames: int
    prior_step: int | None
    prediction: Scores
    repeat_last_frame: Scores  # yardstick: the last given frame, again and again
    reconstruction: Scores  # yardstick, the ceiling: the tokenizer's reconstruction of the true frames
    gain_over_repeat_db: float  # prediction.psnr - repeat_last_frame.psnr
    gain_over_repeat_stderr_db: float | None  # standard error over clips; none for a single clip
    tokenizer: TokenizerScores
    speed: Speed | None = None  # of the sampling; none where it was not measured

    @property
    def beats_repeating(self) -> bool:
        return self.gain_over_repeat_db > 0

    @property
    def frame_numbers(self) -> range:
        """Numbers of the predicted frames, counted from 1 as people do."""
        return range(self.given_frames + 1, self.given_frames + self.predicted_frames + 1)

    @property
    def methods(self) -> dict[str, Scores]:
        return {
            "prediction": self.prediction,
            "repeat last frame": self.repeat_last_frame,
            "reconstruction": self.reconstruction,
        }

    def verdict(self) -> str:
        """Whether prediction beats repeating the last given frame, with its number whichever way it falls."""
        gain = f"{abs(self.gain_over_repeat_db):.2f} dB"
        if self.beats_repeating:
            return f"Predictions beat repeating the last frame by {gain} PSNR."
        return f"Predictions do NOT beat repeating the last frame (−{gain} PSNR)."  # noqa: RUF001


def scores(psnr: np.ndarray, ssim: np.ndarray, mse: np.ndarray) -> Scores:
    """From values ``(clips, predicted frames)``."""
    values = {"psnr": psnr, "ssim": ssim, "mse": mse}
    per_frame = PerFrame(**{name: array.mean(0).tolist() for name, array in values.items()})
    return Scores(**{name: float(array.mean()) for name, array in values.items()}, per_frame=per_frame)


def read_evaluation(path: Path) -> Evaluation:
    """UsageError where metrics.json is missing or damaged."""
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(f"{path}: not there; finish the evaluate job first") from None
    except ValidationError as error:
        what = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}".removeprefix(": ")
        raise UsageError(f"{path}: damaged ({what}); run the evaluate job again") from None


def as_text(evaluation: Evaluation) -> str:
    """The means as a table, then the verdict and what the tokenizer does."""
    frames = evaluation.frame_numbers
    table = Table(
        "method",
        "PSNR (dB)",
        "SSIM",
        "MSE",
        title=f"mean over {evaluation.clips} clips, frames {frames[0]} to {frames[-1]}",
    )
    for name, scores in evaluation.methods.items():
        table.add_row(name, f"{scores.psnr:.2f}", f"{scores.ssim:.4f}", f"{scores.mse:.6f}")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    tokenizer = evaluation.tokenizer
    return (
        f"{evaluation.verdict()}\n{capture.get()}"
        f"reconstruction of all frames {tokenizer.psnr:.2f} dB, best constant frame "
        f"{tokenizer.constant_frame_psnr:.2f} dB: {tokenizer.gain_db:+.2f} dB; {tokenizer.codes_used} of "
        f"{tokenizer.codebook_size} codes in use, perplexity {tokenizer.codebook_perplexity:.1f}"
        f"{f'{chr(10)}{evaluation.speed.in_words()}' if evaluation.speed else ''}"
    )
