"""Perceptual distances of frames: LPIPS, and a substitute that needs no weights."""

from abc import ABC, abstractmethod
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.foreign_weights import place, read_weights
from stpredict.losses import alexnet, vgg
from stpredict.losses.config import LpipsConfig, RandomFeaturesConfig

KEY = "loss.perceptual.network"
#: By its name in the config: the network, the channels of its five maps, and its heads among torchmetrics' files.
_TRUNKS = {
    "vgg16": (vgg.vgg16, vgg.WIDTHS, "vgg.pth"),
    "alexnet": (alexnet.alexnet, alexnet.WIDTHS, "alex.pth"),
}
#: Of LPIPS: the mean and standard deviation of ImageNet's colours, for pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10


class FeatureDistance(nn.Module, ABC):
    """Videos ``(b, c, t, h, w)`` in [-1, 1] to the distance of every frame, ``(b, t)`` in fp32.

    Squared differences of features that have length 1 at every place, weighted per channel, averaged over the places
    and summed over the scales (Zhang et al. 2018, eq. 1). Gradients flow into ``made`` only. It moves to the device of
    what it is given.
    """

    #: As it is called in the metrics.
    name: str

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Images ``(n, c, h, w)`` to a map ``(n, c_i, h_i, w_i)`` per scale."""

    @abstractmethod
    def weigh(self, squares: Tensor, scale: int) -> Tensor:
        """``(n, c_i, h_i, w_i)`` to ``(n, 1, h_i, w_i)``."""

    def forward(self, made: Tensor, truth: Tensor) -> Tensor:
        if next(self.buffers()).device != made.device:
            self.to(made.device)
        images = [rearrange(video.float(), "b c t h w -> (b t) c h w") for video in (made, truth)]
        with torch.no_grad():
            of_truth = [_unit(x) for x in self.features(images[1])]
        of_made = [_unit(x) for x in self.features(images[0])]
        scales = enumerate(zip(of_made, of_truth, strict=True))
        distance = sum(self.weigh((one - other).square(), scale).mean(dim=(1, 2, 3)) for scale, (one, other) in scales)
        return distance.view(len(made), -1)


def _unit(x: Tensor) -> Tensor:
    """Of length 1 over the channels. Where all are 0 they stay 0, and so does the gradient (a bare root's is NaN)."""
    return x / (x.square().sum(1, keepdim=True) + EPSILON**2).sqrt()


class Lpips(FeatureDistance):
    """LPIPS 0.1 with VGG16 or AlexNet (Zhang et al. 2018). One channel is shown to it as grey. ``key`` is what its
    config is called in errors."""

    name = "lpips"

    def __init__(self, config: LpipsConfig, key: str = KEY):
        super().__init__()
        make, widths, file = _TRUNKS[config.network]
        self.trunk = make(config.trunk, f"{key}.trunk")
        with torch.device("meta"):
            self.heads = _Heads(widths)
        if not torch.empty(()).is_meta:
            path = config.heads or Path(str(files("torchmetrics"))) / "functional/image/lpips_models" / file
            place(read_weights(path, f"{key}.heads"), self.heads, f"{key}.heads: {path}")
        self.requires_grad_(False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        return self.trunk((images - self.shift) / self.scale)

    def weigh(self, squares: Tensor, scale: int) -> Tensor:
        return self.heads(squares, scale)


class _Heads(nn.Module):
    """Named as in the lpips package, where a dropout comes before each."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        for scale, width in enumerate(widths):
            head = nn.Module()
            head.model = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            setattr(self, f"lin{scale}", head)

    def forward(self, squares: Tensor, scale: int) -> Tensor:
        return getattr(self, f"lin{scale}").model["1"](squares)


class RandomFeatures(FeatureDistance):
    """No LPIPS: a network of fixed random convolutions, the same on every machine, for those that have no weights."""

    name = "random_features"

    def __init__(self, config: RandomFeaturesConfig, video_channels: int):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        for scale, (width, out) in enumerate(pairwise((video_channels, *config.channels))):
            kernel = torch.randn(out, width, 3, 3, generator=generator, device="cpu") * (2 / (9 * width)) ** 0.5
            self.register_buffer(f"kernel{scale}", kernel)

    def features(self, images: Tensor) -> list[Tensor]:
        found = []
        for kernel in self.buffers():
            images = F.relu(F.conv2d(F.avg_pool2d(images, 2) if found else images, kernel, padding=1))
            found.append(images)
        return found

    def weigh(self, squares: Tensor, scale: int) -> Tensor:
        return squares.sum(1, keepdim=True)


def feature_distance(config: LpipsConfig | RandomFeaturesConfig, video_channels: int) -> FeatureDistance:
    """UsageError where weights cannot be had."""
    match config:
        case LpipsConfig():
            return Lpips(config)
        case RandomFeaturesConfig():
            return RandomFeatures(config, video_channels)
