"""The convolutions of AlexNet (Krizhevsky 2014, one tower), with torchvision's names, and no torchvision."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.losses.pretrained import pretrained

URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"  # torchvision's IMAGENET1K_V1
WIDTHS = (64, 192, 384, 256, 256)
#: Of each convolution: its number in torchvision, where ReLUs and poolings count too; kernel, stride and padding; and
#: whether a pooling of 3x3, stride 2, comes before it.
LAYERS = ((0, 11, 4, 2, False), (3, 5, 1, 2, True), (6, 3, 1, 1, True), (8, 3, 1, 1, False), (10, 3, 1, 1, False))


class AlexNet(nn.Module):
    """Images ``(n, 3, h, w)``, 31x31 at least, to what follows each of its five ReLUs, of ``WIDTHS`` channels."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict()
        width = 3
        for (number, kernel, stride, padding, _), out in zip(LAYERS, WIDTHS, strict=True):
            self.features[str(number)] = nn.Conv2d(width, out, kernel, stride, padding)
            width = out

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number, _, _, _, pooled in LAYERS:
            x = F.relu(self.features[str(number)](F.max_pool2d(x, 3, 2) if pooled else x))
            features.append(x)
        return features


def alexnet(path: Path | None, key: str) -> AlexNet:
    """With the weights of a file in torchvision's layout, else downloaded once; see ``pretrained``."""
    return pretrained(AlexNet, "AlexNet", URL, path, key)
