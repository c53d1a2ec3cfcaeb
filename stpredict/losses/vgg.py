"""The convolutions of VGG16 (Simonyan and Zisserman 2015), with torchvision's names, and no torchvision."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.losses.pretrained import pretrained

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1; its name has its hash
#: Channels of the 3x3 convolutions between the poolings.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
WIDTHS = tuple(stage[-1] for stage in STAGES)


class Vgg16(nn.Module):
    """Images ``(n, 3, h, w)``, 16x16 at least, to what stands before each of its five poolings (relu1_2, relu2_2,
    relu3_3, relu4_3 and relu5_3), of ``WIDTHS`` channels."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict()  # numbered as in torchvision, where ReLUs and poolings count too
        self.stages: list[list[str]] = []
        number, width = 0, 3
        for stage in STAGES:
            self.stages.append([])
            for out in stage:
                self.features[str(number)] = nn.Conv2d(width, out, 3, padding=1)
                self.stages[-1].append(str(number))
                number, width = number + 2, out
            number += 1

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for names in self.stages:
            if features:
                x = F.max_pool2d(x, 2)
            for name in names:
                x = F.relu(self.features[name](x))
            features.append(x)
        return features


def vgg16(path: Path | None, key: str) -> Vgg16:
    """With the weights of a file in torchvision's layout (``features.0.weight``, …), else downloaded once; see
    ``pretrained``."""
    return pretrained(Vgg16, "VGG16", URL, path, key)
