"""SimVP (Gao et al. 2022, arXiv:2206.05099) and SimVPv2 (Tan et al. 2022, arXiv:2211.12509).

An encoder looks at each frame by itself, a translator at all of them at once, stacked into channels, and a decoder
makes a frame of each; one skip leads from the encoder's first layer to the decoder's last. With a quantizer between
encoder and translator, or after that, it is SVQ's model (Chen et al. 2023, arXiv:2312.03406); the skip by-passes it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.translators.build import build_translator
from stpredict.quantizers.build import build_quantizer

GROUPS = 2  # of every GroupNorm


class Forecast(NamedTuple):
    """``frames`` (b, c, t_out, h, w); ``commitment``: what a quantizer adds to the loss, a mean, or None."""

    frames: Tensor
    commitment: Tensor | None = None


def channels_last(images: Tensor) -> Tensor:
    """``(n, c, h, w)`` laid out so that a pixel's channels are neighbours: convolutions are faster on it on a CPU, also
    where their weights are not, which DeepSpeed 0.19 could not send (benchmarks/results/forecasters.md)."""
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    # A single channel lies in memory either way, but convolutions go by the strides that are written down.
    return images.contiguous().view(len(images), *images.shape[2:], 1).permute(0, 3, 1, 2)


def padded(frames: Tensor, stride: int) -> Tensor:
    """``(n, c, h, w)`` with the last row and column repeated, until ``stride`` divides the sides."""
    height, width = frames.shape[-2:]
    down, right = -height % stride, -width % stride
    return F.pad(frames, (0, right, 0, down), mode="replicate") if down or right else frames


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, SiLU: ``(n, c, h, w)`` to ``(n, d, h, w)``; with half or, by PixelShuffle, twice as
    many pixels to a side."""

    def __init__(self, channels: int, out: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out if up else out, 3, stride=2 if down else 1, padding=1)
        self.shuffle = nn.PixelShuffle(2) if up else nn.Identity()
        self.norm, self.act = nn.GroupNorm(GROUPS, out), nn.SiLU()
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.shuffle(self.conv(x))))


class Encoder(nn.Module):
    """Frames ``(n, c, h, w)`` to latents ``(n, hid_S, h', w')`` and what the skip carries, ``(n, hid_S, h, w)``."""

    def __init__(self, config: SimVPConfig):
        super().__init__()
        inputs = [config.channels] + [config.hid_S] * (config.N_S - 1)
        self.blocks = nn.ModuleList(
            ConvBlock(channels, config.hid_S, down=layer % 2 == 1) for layer, channels in enumerate(inputs)
        )

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.blocks
        skip = latent = first(frames)
        for block in others:
            latent = block(latent)
        return latent, skip


class Decoder(nn.Module):
    """Latents ``(n, hid_S, h', w')`` and the skip to frames ``(n, c, h, w)``."""

    def __init__(self, config: SimVPConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvBlock(config.hid_S, config.hid_S, up=layer % 2 == 0) for layer in range(config.N_S)
        )
        self.readout = nn.Conv2d(config.hid_S, config.channels, 1)

    def forward(self, latent: Tensor, skip: Tensor) -> Tensor:
        *others, last = self.blocks
        for block in others:
            latent = block(latent)
        return self.readout(last(latent + skip))


class SimVP(nn.Module):
    """Scaled frames ``(b, c, t_in, h, w)`` to the ``output_frames`` that follow. ValueError for other frames than the
    config's."""

    def __init__(self, config: SimVPConfig):
        super().__init__()
        self.config = config
        stacked = config.input_frames * config.hid_S
        self.encoder = Encoder(config)
        self.quantizer = build_quantizer(config.quantizer, config.hid_S) if config.quantizer else None
        self.translator = build_translator(config.translator, stacked, config.hid_T, config.N_T, config.grid)
        self.decoder = Decoder(config)

    @property
    def commits(self) -> bool:
        """Whether its forecasts come with a commitment."""
        return self.config.quantizer is not None and self.config.quantizer.commits

    def layers(self) -> list[nn.Module]:
        """In the order of the forward pass: what may be recomputed or compiled one by one."""
        return [*self.encoder.blocks, *self.translator.blocks, *self.decoder.blocks]

    @property
    def passes(self) -> int:
        """Times that a forward pass goes through the network, for the whole horizon."""
        return -(-self.config.output_frames // self.config.input_frames)

    @property
    def drop_rates(self) -> Sequence[float]:
        """Of each residual branch of the translator: how likely it is left out in training."""
        return self.translator.drop_rates

    def forward(self, frames: Tensor, kept: Tensor | None = None) -> Forecast:
        """Of longer horizons, each ``input_frames`` of them are predicted from those predicted before, with their
        graph. ``kept``: by what each residual branch of the translator is multiplied for each sample, ``(b, passes,
        branches)``; None, as in evaluation: by 1."""
        config = self.config
        wanted = (config.channels, config.input_frames, *config.size)
        if frames.shape[1:] != wanted:
            raise ValueError(f"frames (c, t, h, w) are {tuple(frames.shape[1:])}, this model takes {wanted}")
        parts: list[Tensor] = []
        commitments: list[Tensor] = []
        of_passes = [()] * self.passes
        if kept is not None:
            of_passes = rearrange(kept, "b passes branches -> passes 1 branches b").contiguous()
        for of_pass in of_passes:
            frames, commitment = self._next(frames, *of_pass)
            parts.append(frames)
            commitments += [] if commitment is None else [commitment]
        predicted = torch.cat(parts, dim=2)[:, :, : config.output_frames]
        return Forecast(predicted, torch.stack(commitments).mean() if commitments else None)

    def _next(self, frames: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """As many frames as are given, and the quantizer's part of the loss."""
        batch, *_, height, width = frames.shape
        latent, skip = self._encoded(frames)
        latent, commitment = self._quantized(latent, batch, "before")
        latent = self._translated(latent, batch, *kept)
        if commitment is None:
            latent, commitment = self._quantized(latent, batch, "after")
        made = self.decoder(channels_last(latent), skip)[..., :height, :width]
        return rearrange(made, "(b t) c h w -> b c t h w", b=batch), commitment

    def _encoded(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of all frames ``(b t, hid_S, h', w')``, and what the skip carries."""
        images = rearrange(frames, "b c t h w -> (b t) c h w").to(self.decoder.readout.weight.dtype)
        return self.encoder(channels_last(padded(images, self.config.stride)))

    def _translated(self, latent: Tensor, batch: int, *kept: Tensor) -> Tensor:
        """``(b t, hid_S, h', w')`` to the same."""
        # Channels last before and after, by one copy each.
        stacked = rearrange(latent, "(b t) c h w -> b h w (t c)", b=batch)
        made = self.translator(rearrange(stacked, "b h w c -> b c h w"), *kept)
        images = rearrange(made, "b (t c) h w -> (b t) h w c", t=self.config.input_frames)
        return rearrange(images, "n h w c -> n c h w")

    def _quantized(self, latent: Tensor, batch: int, place: str) -> tuple[Tensor, Tensor | None]:
        if self.quantizer is None or self.config.quantizer.place != place:
            return latent, None
        quantized, commitment = self.quantizer(rearrange(latent, "(b t) c h w -> b t c h w", b=batch))
        return rearrange(quantized, "b t c h w -> (b t) c h w"), commitment

    def latents(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What the quantizer gets and what it makes of it, ``(b, t, c, h', w')`` each, of the first frames. ValueError
        where there is none."""
        if self.quantizer is None:
            raise ValueError("this model has no quantizer")
        batch = len(frames)
        latent, _ = self._encoded(frames)
        if self.config.quantizer.place == "after":
            latent = self._translated(latent, batch)
        latent = rearrange(latent, "(b t) c h w -> b t c h w", b=batch)
        return latent, self.quantizer(latent)[0]
