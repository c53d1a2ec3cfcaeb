"""Convolutions of the translators' blocks, and how the weights of blocks begin."""

from torch import nn


def depthwise(channels: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    """Each channel by itself, ``(b, c, h, w)`` to the same; ``kernel`` is odd, zeros are around the frame."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels)


def he_normal(module: nn.Module) -> None:
    """For ``apply``: convolutions keep the variance of gradients (He et al. 2015, by fan-out), biases begin at 0."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        fan_out = height * width * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(module.bias)


def narrow_normal(module: nn.Module) -> None:
    """For ``apply``: linear layers and convolutions begin normal with standard deviation 0.02, biases at 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
