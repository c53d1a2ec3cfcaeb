"""SVQ-raw: sparse coding itself (Chen et al., arXiv:2312.03406, eq. 1), by learned iterative shrinkage (LISTA; Gregor &
LeCun 2010). SVQ is its cheap stand-in.

For a vector x and codes M ``(K, S)``, the non-negative lasso

    min over w >= 0 of |x - w M|^2 / 2 + lambda |w|_1

is solved by w <- relu(w - (w M - x) M^T / L - lambda / L), where L is the largest eigenvalue of M M^T. LISTA takes a
fixed number of such steps and learns what they are made of: the map from x, which begins as M / L, the inhibition of
codes by each other, M M^T / L, and the threshold, lambda / L.

The inhibition is K x K: a location costs 2 K S + (steps - 1) K^2 multiply-adds (10 million of them at K = 1024, S = 32,
6 times what SVQ as published takes at K = 10,000), and the backward pass needs K weights of every step. That is why the
paper runs out of memory at K = 4096, and why the default is 1024.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.quantizers.config import SvqRawConfig
from stpredict.quantizers.svq import drawn_codebook

FIRST_LAMBDA = 0.1


class SvqRaw(nn.Module):
    """``(b, t, channels, h, w)`` → the same shape, and None: nothing is chosen, so nothing needs to be kept close.

    Computes in fp32 at least, as what is iterated in bf16 stays where rounding leaves it.
    """

    def __init__(self, config: SvqRawConfig, channels: int):
        super().__init__()
        self.steps = config.steps
        codebook = drawn_codebook(config.codebook_size, channels, "kaiming_uniform")
        encode, inhibition, threshold = unlearned(codebook, FIRST_LAMBDA)
        self.codebook = nn.Parameter(codebook)
        self.encode = nn.Parameter(encode)
        self.inhibition = nn.Parameter(inhibition)
        #: Of the threshold, which stays positive so.
        self.log_threshold = nn.Parameter(threshold.log())

    def forward(self, latents: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(latents.device.type, enabled=False):
            weights = self._weights(rearrange(latents, "b t c h w -> b t h w c"))
            out = weights @ self.codebook.to(weights.dtype)
        return rearrange(out, "b t h w c -> b t c h w").to(latents.dtype), None

    def _weights(self, x: Tensor) -> Tensor:
        """``(..., channels)`` → w ``(..., K)``, none negative."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        inhibition = self.inhibition.to(x.dtype)
        drive = F.linear(x, self.encode.to(x.dtype)) - self.log_threshold.to(x.dtype).exp()
        w = F.relu(drive)
        for _ in range(self.steps - 1):
            w = F.relu(w - F.linear(w, inhibition) + drive)
        return w

    @torch.no_grad()
    def weights(self, latents: Tensor, locations: int = 1024) -> Iterator[Tensor]:
        """w of the latents ``(b, t, channels, h, w)``, ``(n, K)`` of up to ``locations`` at a time, in the order of b,
        t, h and w, in fp32 at least."""
        for part in rearrange(latents, "b t c h w -> (b t h w) c").split(locations):
            yield self._weights(part)


def unlearned(codebook: Tensor, lasso_lambda: float) -> tuple[Tensor, Tensor, Tensor]:
    """With these, the steps go to the solution of the lasso: what multiplies x ``(K, S)``, the inhibition ``(K, K)``
    and the threshold ``(1,)``."""
    largest = torch.linalg.eigvalsh(codebook.T @ codebook)[-1:]  # the same as of M M^T, which is larger
    return codebook / largest, codebook @ codebook.T / largest, lasso_lambda / largest
