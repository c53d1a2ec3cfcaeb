"""Rotary positions (RoFormer, eq. 34) on one axis, as in LLaMA, or on several, each with its share of a head."""

import torch
from torch import Tensor


def axis_pairs(head_width: int, axes: int) -> list[int]:
    """How many of the ``head_width / 2`` rotated pairs each axis gets: equal shares, the first takes the rest."""
    pairs = head_width // 2
    share = pairs // axes
    return [pairs - share * (axes - 1), *[share] * (axes - 1)]


def rotation(positions: Tensor, head_width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 ``(n, head_width / 2)``, for integer ``positions`` ``(n, axes)``."""
    angles = []
    for axis, pairs in enumerate(axis_pairs(head_width, positions.shape[1])):
        frequencies = base ** (-torch.arange(pairs, dtype=torch.float32, device=positions.device) / pairs)
        angles.append(positions[:, axis, None].float() * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + d/2) of ``x`` ``(b, heads, n, d)`` by the angles of ``cos``, ``sin`` ``(n, d/2)``."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
