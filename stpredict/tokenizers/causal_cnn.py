"""The tokenizer of NBP (Ren et al. 2025, arXiv:2502.07737): a causal 3D CNN with finite scalar quantization.

A clip ``(b, c, 1 + 4n, h, w)`` becomes token ids ``(b, 1 + n, h / 8, w / 8)`` at the published strides. The
first frame stands alone, so one image is a clip of one frame, and later frames never change earlier tokens.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from stpredict.layers.causal_conv import (
    CausalConv3d,
    CausalDownsample,
    CausalUpsample,
    FrameGroupNorm,
    Past,
    ResidualBlock,
    ScaledSwish,
)
from stpredict.tokenizers.config import WHOLE, CausalCnnConfig, TilingConfig
from stpredict.tokenizers.tiles import decode_tiles, encode_tiles


def _stages(
    width: int, channels: tuple[int, ...], blocks: tuple[int, ...], groups: int, between: Callable, strides: tuple
) -> tuple[nn.ModuleList, int]:
    """Stages of residual blocks with ``between(width, stride)`` after each but the last; also the width at the end.

    The first block of a stage changes the width; a stage without blocks keeps that of the one before.
    """
    layers = nn.ModuleList()
    for out, count, stride in zip(channels, blocks, (*strides, None), strict=True):
        for _ in range(count):
            layers.append(ResidualBlock(width, out, groups))
            width = out
        if stride is not None:
            layers.append(between(width, stride))
    return layers, width


class Encoder(nn.Module):
    """Clip ``(b, c, t, h, w)`` to vectors ``(b, d, t', h', w')`` before quantization.

    Chunk by chunk with the same ``past``: 1 + temporal_factor * n frames first, then multiples of temporal_factor.
    """

    def __init__(self, config: CausalCnnConfig):
        super().__init__()
        first, groups = config.channels[0], config.groups
        self.patch = config.patch
        self.conv_in = CausalConv3d(config.video_channels * config.patch**2, first)
        self.stages, width = _stages(first, config.channels, config.blocks, groups, CausalDownsample, config.strides)
        self.middle = nn.ModuleList(ResidualBlock(width, width, groups) for _ in range(config.middle_blocks))
        self.norm_out, self.act_out = FrameGroupNorm(groups, width), ScaledSwish(width)
        self.conv_out = CausalConv3d(width, len(config.levels), kernel=1)

    def forward(self, video: Tensor, past: Past | None = None) -> Tensor:
        p = self.patch
        video = video.to(self.conv_in.weight.dtype)
        x = self.conv_in(rearrange(video, "b c t (h p) (w q) -> b (c p q) t h w", p=p, q=p), past)
        for layer in (*self.stages, *self.middle):
            x = layer(x, past)
        return self.conv_out(self.act_out(self.norm_out(x)))


class Decoder(nn.Module):
    """Quantized vectors ``(b, d, t', h', w')`` to a clip ``(b, c, t, h, w)``; chunk by chunk with the same ``past``."""

    def __init__(self, config: CausalCnnConfig):
        super().__init__()
        channels, strides, groups = config.channels[::-1], config.strides[::-1], config.groups
        blocks = (config.decoder_blocks or config.blocks)[::-1]
        self.patch = config.patch
        self.conv_in = CausalConv3d(len(config.levels), channels[0])
        self.middle = nn.ModuleList(
            ResidualBlock(channels[0], channels[0], groups) for _ in range(config.middle_blocks)
        )
        self.stages, width = _stages(channels[0], channels, blocks, groups, CausalUpsample, strides)
        self.norm_out, self.act_out = FrameGroupNorm(groups, width), ScaledSwish(width)
        self.conv_out = CausalConv3d(width, config.video_channels * config.patch**2)

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        x = self.conv_in(z, past)
        for layer in (*self.middle, *self.stages):
            x = layer(x, past)
        x = self.conv_out(self.act_out(self.norm_out(x)), past)
        return rearrange(x, "b (c p q) t h w -> b c t (h p) (w q)", p=self.patch, q=self.patch)


class CausalCnnTokenizer(nn.Module):
    """Encoder, FSQ without projection, decoder. ``forward`` is the training pass."""

    def __init__(self, config: CausalCnnConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        with torch.device("cpu"):  # FSQ reads its level buffers while building, which fails on the meta device
            self.quantizer = FSQ(list(config.levels), channel_first=True)
        self.decoder = Decoder(config)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, d, t', h', w')`` to its quantized copy (straight-through) and ids ``(b, t', h', w')`` int64.

        In fp32 whatever the model's precision: rounding a bf16 bound flips codes.
        """
        with torch.autocast(z.device.type, enabled=False):
            quantized, ids = self.quantizer(z.float())
        return quantized, ids.long()

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Clip ``(b, c, t, h, w)`` in [-1, 1] to its reconstruction and its ids ``(b, t', h', w')``."""
        z = self.encoder(video)
        quantized, ids = self.quantize(z)
        return self.decoder(quantized.to(z.dtype)), ids

    @torch.no_grad()
    def encode(self, video: Tensor, tiling: TilingConfig = WHOLE) -> Tensor:
        """Clip ``(b, c, t, h, w)`` in [-1, 1] to token ids ``(b, t', h', w')`` int64."""
        return self.quantize(encode_tiles(self.encoder, video, tiling, self.config))[1]

    @torch.no_grad()
    def decode(self, ids: Tensor, tiling: TilingConfig = WHOLE) -> Tensor:
        """Token ids ``(b, t', h', w')`` to a clip ``(b, c, t, h, w)``, clamped to [-1, 1]."""
        z = self.quantizer.indices_to_codes(ids).to(self.decoder.conv_in.weight.dtype)
        return decode_tiles(self.decoder, z, tiling, self.config).clamp(-1, 1)
