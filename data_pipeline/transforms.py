"""Between decoded clips and the tensors that models see."""

import torch
from einops import rearrange


def to_video(clip: torch.Tensor) -> torch.Tensor:
    """uint8 (b, t, h, w, c) → float32 (b, c, t, h, w) in [-1, 1]."""
    return rearrange(clip, "b t h w c -> b c t h w").float() / 127.5 - 1


def to_clip(video: torch.Tensor) -> torch.Tensor:
    """Float (b, c, t, h, w), nominally in [-1, 1] → uint8 (b, t, h, w, c), clamped and rounded."""
    levels = ((video.float() + 1) * 127.5).round().clamp(0, 255)
    return rearrange(levels, "b c t h w -> b t h w c").to(torch.uint8)
