"""Sparse vector quantization (Chen et al., arXiv:2312.03406, sections 3.2 and 5.3), between a forecaster's encoder and
its translator.

Every location of every frame becomes weights, W = MLP(x), one for each of K codes, and comes out as W M, the sum of the
codes M ``(K, S)`` by those weights. Nothing chooses and nothing is straight-through: all of it has plain gradients.

**What is computed.** As published, no non-linearity stands between the MLP's last layer, W = h A^T + a, and the
codebook. So

    W M = h (A^T M) + a M:

SVQ is a two-layer MLP whose second layer, a matrix of hidden x S, is a product of two factors through K. What K buys is
over-parametrisation (another path of the optimizer to the same functions, and the weights of a frozen codebook as a
random projection of them), not another set of functions; with one layer (``hidden: null``), SVQ is an affine map. The
product of the factors is one small multiplication of parameters, whatever the number of locations. Training and
prediction multiply by it, so that nothing K wide is ever made of a location: the same outputs and gradients for a
fraction of the memory and of the arithmetic (benchmarks/svq_memory.py). ``published_macs`` is what the papers count,
and ``weights`` gives W to who wants to look at it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.quantizers.config import SvqConfig


class FactoredCodes(nn.Module):
    """``(..., width)`` → ``(..., channels)``: what weights W = ``h weight^T + bias`` make of the codebook."""

    def __init__(self, width: int, codes: int, channels: int, learnable: bool, init: str):
        super().__init__()
        linear = nn.Linear(width, codes)
        self.weight, self.bias = linear.weight, linear.bias
        codebook = drawn_codebook(codes, channels, init)
        if learnable:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)

    def forward(self, h: Tensor) -> Tensor:
        matrix, offset = self.product()
        return F.linear(h, matrix.to(h.dtype), offset.to(h.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        """(A^T M)^T ``(channels, width)`` and a M ``(channels,)``, in fp32 at least: K terms are summed in each."""
        with torch.autocast(self.weight.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            codebook = self.codebook.to(dtype)
            return codebook.T @ self.weight.to(dtype), self.bias.to(dtype) @ codebook


class Svq(nn.Module):
    """``(b, t, channels, h, w)`` → the same shape, and None: SVQ has no commitment loss."""

    def __init__(self, config: SvqConfig, channels: int):
        super().__init__()
        self.mlp = (
            nn.Identity()
            if config.hidden is None
            else nn.Sequential(nn.Linear(channels, config.hidden), nn.ReLU(inplace=True))
        )
        self.codes = FactoredCodes(
            config.hidden or channels, config.codebook_size, channels, config.learnable, config.init
        )

    @property
    def codebook(self) -> Tensor:
        """M ``(K, channels)``."""
        return self.codes.codebook

    def forward(self, latents: Tensor) -> tuple[Tensor, None]:
        h = self.mlp(rearrange(latents, "b t c h w -> b t h w c"))
        return rearrange(self.codes(h), "b t h w c -> b t c h w"), None

    @torch.no_grad()
    def weights(self, latents: Tensor, locations: int = 1024) -> Iterator[Tensor]:
        """W of the latents ``(b, t, channels, h, w)``, ``(n, K)`` of up to ``locations`` at a time, in the order of
        b, t, h and w, in fp32 at least. W M is what ``forward`` gives."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        for part in rearrange(latents, "b t c h w -> (b t h w) c").split(locations):
            yield F.linear(self.mlp(part).to(dtype), self.codes.weight.to(dtype), self.codes.bias.to(dtype))

    def published_macs(self, locations: int) -> int:
        """Multiply-adds of SVQ as published, with W written out, for so many locations (b t h w)."""
        codes, width = self.codes.weight.shape
        channels = self.codebook.shape[1]
        hidden = 0 if isinstance(self.mlp, nn.Identity) else channels * width
        return locations * (hidden + width * codes + codes * channels)

    def macs_saved(self, locations: int) -> int:
        """Of those, what is not computed for so many locations at once: the products of factors and bias are made
        once."""
        codes, width = self.codes.weight.shape
        channels = self.codebook.shape[1]
        hidden = 0 if isinstance(self.mlp, nn.Identity) else channels * width
        return self.published_macs(locations) - locations * (hidden + width * channels) - (width + 1) * codes * channels


def drawn_codebook(codes: int, channels: int, init: str) -> Tensor:
    """fp32 ``(codes, channels)``, by one of the four ways of the paper's table 9 (gains as in its authors' code)."""
    codebook = torch.empty(codes, channels)
    match init:
        case "normal":
            nn.init.normal_(codebook)
        case "kaiming_uniform":
            nn.init.kaiming_uniform_(codebook)
        case "xavier_uniform":
            nn.init.xavier_uniform_(codebook, gain=nn.init.calculate_gain("relu"))
        case "orthogonal":
            nn.init.orthogonal_(codebook)
        case _:
            raise ValueError(f"no initialisation {init!r} of a codebook")
    return codebook
