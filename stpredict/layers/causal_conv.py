"""Causal 3D convolution and the layers that go with it. Nothing here lets a frame see a later one.

So a video may go through them in chunks of frames, one after another: whoever calls them gives every chunk of it the
same ``Past``, empty at first, where each convolution leaves what it needs of the frames that are gone.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Past = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """3D convolution whose frame t sees frames <= t only, on ``(b, c, t, h, w)``.

    The edges are replicated: ``kernel - 1`` frames before the first, half a kernel around each frame.
    With stride s in time, 1 + s*n frames become 1 + n; of a video in chunks, s*n frames become n in all but the first.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__(in_channels, out_channels, kernel, stride)
        side = kernel // 2
        self.edges = (side, side, side, side, kernel - 1, 0)

    def reset_parameters(self) -> None:
        """Starts as an orthogonal map of the taps that the stride keeps (one, where it is 1), with small noise around.

        A 3x3x3 kernel of pure noise scrambles neighbouring positions, which training has to undo first
        (benchmarks/initialization.py measures it: 2 dB after 100 steps at demo size).
        """
        nn.init.normal_(self.weight, std=0.1 / self.weight[0].numel() ** 0.5)
        st, sh, sw = self.stride
        at, ah, aw = (min(k, s) for k, s in zip(self.kernel_size, (st, sh, sw), strict=True))
        side = self.kernel_size[1] // 2
        kept = torch.empty(self.out_channels, self.in_channels * at * ah * aw)
        nn.init.orthogonal_(kept)
        with torch.no_grad():
            taps = self.weight[:, :, self.kernel_size[0] - at :, side : side + ah, side : side + aw]
            taps += kept.view(self.out_channels, self.in_channels, at, ah, aw)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if not any(self.edges):
            return super().forward(x)
        if past is None:
            return super().forward(F.pad(x, self.edges, mode="replicate"))
        *sides, before, _ = self.edges
        x = torch.cat([past.get(self, x[:, :, :1].expand(-1, -1, before, -1, -1)), x], dim=2)
        past[self] = x[:, :, self.stride[0] - self.kernel_size[0] :].clone()  # what the next frame sees of these
        return super().forward(F.pad(x, (*sides, 0, 0), mode="replicate"))


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of every frame by itself: statistics that span time would tell a frame of its future."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(x, "(b t) c h w -> b c t h w", b=b)


class ScaledSwish(nn.Module):
    """``x * sigmoid(slope * x)`` with a learnable slope per channel, on ``(b, c, t, h, w)``; swish where it is 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope.view(-1, 1, 1, 1) * x)


class CausalDownsample(CausalConv3d):
    """Strided convolution: 1 + st*n frames to 1 + n, height and width divided by the stride."""

    def __init__(self, channels: int, stride: tuple[int, int, int]):
        super().__init__(channels, channels, stride=stride)


class CausalUpsample(nn.Module):
    """Inverse shape of :class:`CausalDownsample`: convolution, then depth-to-space with channels split as (t, h, w, c).

    Where time doubles the first frame is dropped, so that 1 + n frames become 1 + 2n; of a video in chunks, n frames
    become 2n in all but the first.
    """

    def __init__(self, channels: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(channels, channels * stride[0] * stride[1] * stride[2])

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        st, sh, sw = self.stride
        begun = past is not None and self.conv in past
        x = rearrange(self.conv(x, past), "b (st sh sw c) t h w -> b c (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)
        return x if begun else x[:, :, st - 1 :]


class ResidualBlock(nn.Module):
    """Norm, swish, convolution, twice, added to the input (through a 1x1x1 convolution where channels change)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1, self.act1 = FrameGroupNorm(groups, in_channels), ScaledSwish(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2, self.act2 = FrameGroupNorm(groups, out_channels), ScaledSwish(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)), past)
        h = self.conv2(self.act2(self.norm2(h)), past)
        return self.shortcut(x) + h
