"""3D PatchGAN: a discriminator of overlapping patches of a video, and what it and the model learn from each other.

PatchGAN is Isola et al. 2017 (pix2pix), section 3.2.2; in three dimensions, with these kernels and paddings, it is the
one of TATS (Ge et al. 2022). Theirs has BatchNorm; here GroupNorm stands in its place, so that a clip's logits depend
on that clip alone, on any number of ranks, and R1 can be differentiated.
"""

from math import prod

import torch
from torch import Tensor, nn

from stpredict.losses.adversarial import ADVERSARIAL_LOSSES, LeCam, r1_penalty
from stpredict.losses.config import AdversarialLossConfig, PatchGanConfig
from stpredict.training.task import Forward, Sums

KERNEL, PADDING, SLOPE = 4, 2, 0.2
WIDEST = 8  # times the first width


class PatchDiscriminator(nn.Module):
    """Video ``(b, c, t, h, w)`` to logits ``(b, 1, t', h', w')``, one per patch. Any size will do, an image too."""

    def __init__(self, config: PatchGanConfig, video_channels: int, lecam_decay: float | None = None):
        super().__init__()
        widths = [config.channels * min(2**layer, WIDEST) for layer in range(config.layers + 1)]
        self.strides = [2] * config.layers + [1, 1]
        layers = [_Convolution(video_channels, widths[0], self.strides[0]), nn.LeakyReLU(SLOPE)]
        for width, out, stride in zip(widths[:-1], widths[1:], self.strides[1:-1], strict=True):
            layers += [_Convolution(width, out, stride), nn.GroupNorm(config.groups, out), nn.LeakyReLU(SLOPE)]
        self.network = nn.Sequential(*layers, _Convolution(widths[-1], 1, self.strides[-1]))
        self.lecam = None if lecam_decay is None else LeCam(lecam_decay)

    def forward(self, video: Tensor) -> Tensor:
        return self.network(video)

    def logits(self, *sides: int) -> int:
        """Of one video of ``sides`` (t, h, w)."""
        for stride in self.strides:
            sides = tuple((side + 2 * PADDING - KERNEL) // stride + 1 for side in sides)
        return prod(sides)


class _Convolution(nn.Conv3d):
    """Starts as pix2pix's do."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, KERNEL, stride, PADDING)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class PatchGan:
    """A task's adversarial terms, as sums: ``real`` and ``fake`` are videos ``(b, c, t, h, w)`` in fp32.

    The discriminator's loss is half the sum of both sides', as VQGAN's.
    """

    def __init__(self, config: AdversarialLossConfig, video_channels: int):
        self.config, self.loss = config, ADVERSARIAL_LOSSES[config.loss]
        self.discriminator = PatchDiscriminator(
            config.discriminator, video_channels, config.lecam_decay if config.lecam else None
        )
        self.model_weights = {"adversarial": config.weight}
        self.weights = {"real": 0.5, "fake": 0.5}
        if config.lecam:
            self.weights |= {"lecam_real": config.lecam, "lecam_fake": config.lecam}
        if config.r1:
            self.weights["r1"] = config.r1 / 2 * config.r1_every  # as large as if it were computed on every update

    def counts(self, videos: int, *sides: int) -> dict[str, float]:
        """Each term's denominator for so many videos of ``sides`` (t, h, w): their logits. R1's too: its gradients add
        up over a video's patches, so gamma means the same at every size."""
        logits = float(videos * self.discriminator.logits(*sides))
        return dict.fromkeys(("adversarial", "logit_real", "logit_fake", *self.weights), logits)

    def model_step(self, judge: Forward, fake: Tensor) -> Sums:
        return {"adversarial": self.loss.model(judge(fake)).sum()}

    def discriminator_step(self, forward: Forward, real: Tensor, fake: Tensor, update: int) -> Sums:
        of_real, of_fake = forward(torch.cat([real, fake])).chunk(2)
        sums = {"real": self.loss.real(of_real).sum(), "fake": self.loss.fake(of_fake).sum()}
        sums |= {"logit_real": of_real.sum(), "logit_fake": of_fake.sum()}
        if lecam := self.discriminator.lecam:
            sums |= {"lecam_real": lecam.real(of_real).sum(), "lecam_fake": lecam.fake(of_fake).sum()}
        if self.config.r1 and update % self.config.r1_every == 0:
            sums["r1"] = r1_penalty(forward, real)
        return sums

    def updated(self, means: Sums) -> None:
        if lecam := self.discriminator.lecam:
            lecam.update(means["logit_real"], means["logit_fake"])
