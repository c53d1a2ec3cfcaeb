"""The frame-prediction protocol: predicted frames against the true ones, beside two yardsticks on the same clips.

*Repeat last frame* is what costs nothing, and what a prediction must beat; the tokenizer's *reconstruction* of the true
frames is the ceiling of anything that predicts its tokens. The results are described in results.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.evaluation.frame_metrics import SSIM_WINDOW, frame_mse, frame_psnr, frame_ssim
from stpredict.evaluation.generated import Generated
from stpredict.evaluation.results import Evaluation, TokenizerScores, scores
from stpredict.quantizers.code_use import perplexity

CHUNK_VALUES = 2**21  # pixel values measured at once; float64 and SSIM's five maps make some 200 MB of them


def evaluate(generated: Generated, report: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
    """Measures all clips, some at a time; calls ``report(clips done, clips)``.

    UsageError where the frames are too small for SSIM.
    """
    n, t, h, w, c = generated.truth.shape
    given = generated.index.given_frames
    if min(h, w) < SSIM_WINDOW:
        raise UsageError(f"frames of {h}x{w} pixels: SSIM needs {SSIM_WINDOW}x{SSIM_WINDOW} at least; use larger clips")
    size = max(1, CHUNK_VALUES // (t * h * w * c))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, n, size):
        clips = (generated.truth, generated.prediction, generated.reconstruction)
        truth, prediction, reconstruction = (torch.from_numpy(x[start : start + size].copy()) for x in clips)
        future = truth[:, given:]
        measured = {
            "prediction": measure(prediction[:, given:], future),
            "repeat": measure(truth[:, given - 1 : given].expand_as(future), future),
            "reconstruction": measure(reconstruction[:, given:], future),
            "reconstruction of all": frame_psnr(frame_mse(reconstruction, truth)).numpy(),
            "constant": frame_psnr(frame_mse(best_constant_frame(truth), truth)).numpy(),
        }
        for name, values in measured.items():
            parts.setdefault(name, []).append(values)
        report(min(start + size, n), n)
    # The clips' axis is the last but one in all of them.
    values = {name: np.concatenate(chunks, axis=-2) for name, chunks in parts.items()}
    prediction, repeat = scores(*values["prediction"]), scores(*values["repeat"])
    gains = (values["prediction"][0] - values["repeat"][0]).mean(1)
    return Evaluation(
        clips=n,
        given_frames=given,
        predicted_frames=t - given,
        prior_step=generated.index.prior_step,
        prediction=prediction,
        repeat_last_frame=repeat,
        reconstruction=scores(*values["reconstruction"]),
        gain_over_repeat_db=float(gains.mean()),
        gain_over_repeat_stderr_db=float(gains.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        tokenizer=_tokenizer_scores(values["reconstruction of all"], values["constant"], generated),
        speed=generated.index.speed,
    )


def measure(prediction: Tensor, truth: Tensor) -> np.ndarray:
    """PSNR, SSIM and MSE of every frame: uint8 ``(b, t, h, w, c)`` to float64 ``(3, b, t)``."""
    mse = frame_mse(prediction, truth)
    return torch.stack([frame_psnr(mse), frame_ssim(prediction, truth), mse]).numpy()


def best_constant_frame(truth: Tensor) -> Tensor:
    """For each clip the one colour with the least squared error on it, its mean: ``(b, t, h, w, c)`` to
    ``(b, 1, 1, 1, c)``."""
    return truth.double().mean(dim=(1, 2, 3), keepdim=True)


def _tokenizer_scores(psnr: np.ndarray, constant_psnr: np.ndarray, generated: Generated) -> TokenizerScores:
    uses = np.bincount(generated.truth_tokens.ravel(), minlength=generated.index.codebook_size)
    return TokenizerScores(
        psnr=float(psnr.mean()),
        constant_frame_psnr=float(constant_psnr.mean()),
        gain_db=float(psnr.mean() - constant_psnr.mean()),
        codes_used=int((uses > 0).sum()),
        codebook_size=generated.index.codebook_size,
        codebook_perplexity=perplexity(torch.from_numpy(uses)),
        tokens=int(uses.sum()),
    )
