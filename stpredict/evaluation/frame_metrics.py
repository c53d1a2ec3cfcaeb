"""MSE, PSNR and SSIM per frame, on clips with pixels in 0..255; SSIM is torchmetrics'."""

import torch
from einops import rearrange, reduce
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_WINDOW = 7


def frame_mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of every frame with pixels in [0, 1]: uint8 ``(b, t, h, w, c)`` to float64 ``(b, t)``."""
    return ((prediction.double() - truth.double()) / 255).square().mean(dim=(2, 3, 4))


def frame_psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of frames with pixels in [0, 1]. An exact frame counts as an error of
    1/4 grey level (60.2 dB), so that means stay finite."""
    return -10 * torch.log10(mse.clamp_min((0.25 / 255) ** 2))


def frame_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of every frame, 7x7 uniform window, data range 1: ``(b, t, h, w, c)`` to ``(b, t)``.

    The mean over channels and the windows that lie inside the frame (Wang et al. 2004, with population variances).
    """
    b, _, h, w, _ = truth.shape
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of {SSIM_WINDOW}x{SSIM_WINDOW} pixels at least, got {h}x{w}")
    images = [rearrange(x, "b t h w c -> (b t) c h w").double() / 255 for x in (prediction, truth)]
    _, ssim = structural_similarity_index_measure(
        *images,
        gaussian_kernel=False,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,  # also of the windows that stick out, over reflected pixels: cut off below
    )
    edge = SSIM_WINDOW // 2
    return reduce(ssim[..., edge : h - edge, edge : w - edge], "(b t) c h w -> b t", "mean", b=b)
