"""Measures what a reconstruct job wrote, frame by frame; the results are described in reconstructed.py."""

from collections.abc import Callable
from math import log2

import numpy as np
import torch

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from data_pipeline.transforms import to_video
from stpredict.evaluation.frame_metrics import SSIM_WINDOW, frame_mse, frame_psnr
from stpredict.evaluation.frame_prediction import CHUNK_VALUES, best_constant_frame, measure
from stpredict.evaluation.reconstructed import Reconstructed, Reconstruction
from stpredict.losses.config import LpipsConfig
from stpredict.losses.perceptual import Lpips
from stpredict.quantizers.code_use import perplexity


@torch.no_grad()
def evaluate_reconstruction(
    found: Reconstructed,
    lpips: LpipsConfig | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Reconstruction:
    """Measures all clips, some at a time; calls ``report(clips done, clips)``.

    UsageError where the frames are too small for SSIM or LPIPS, or LPIPS has no weights.
    """
    n, t, h, w, c = found.truth.shape
    if min(h, w) < SSIM_WINDOW:
        raise UsageError(f"frames of {h}x{w} pixels: SSIM needs {SSIM_WINDOW}x{SSIM_WINDOW} at least; use larger clips")
    network = None
    if lpips:
        lpips.check_clip(ClipConfig(frames=t, size=(h, w), channels=c), "lpips")
        network = Lpips(lpips)
    size = max(1, CHUNK_VALUES // (t * h * w * c))
    parts, constant, distances = [], [], []
    uses = np.zeros(found.index.codebook_size, np.int64)
    for start in range(0, n, size):
        here = slice(start, start + size)
        truth, made = (torch.from_numpy(array[here].copy()) for array in (found.truth, found.reconstruction))
        parts.append(measure(made, truth))
        constant.append(frame_psnr(frame_mse(best_constant_frame(truth), truth)).numpy())
        if network:
            distances.append(network(to_video(made), to_video(truth)).numpy())
        uses += np.bincount(found.truth_tokens[here].ravel(), minlength=len(uses))
        report(min(start + size, n), n)
    psnr, ssim, mse = np.concatenate(parts, axis=1)
    spread = perplexity(torch.from_numpy(uses))
    return Reconstruction(
        clips=n,
        frames=t,
        tokenizer_step=found.index.tokenizer_step,
        psnr=float(psnr.mean()),
        ssim=float(ssim.mean()),
        mse=float(mse.mean()),
        lpips=float(np.concatenate(distances).mean()) if network else None,
        psnr_per_frame=psnr.mean(0).tolist(),
        constant_frame_psnr=float(np.concatenate(constant).mean()),
        codes_used=int((uses > 0).sum()),
        codebook_size=len(uses),
        codebook_perplexity=spread,
        codebook_entropy_bits=log2(spread),
        tokens=int(uses.sum()),
    )
