"""The quantizers that SVQ is compared with (its tables 6 and 13), at the same place: vector-quantize-pytorch's.

Each chooses codes for every location of every frame, and passes gradients straight through the choice. Of the library
(1.32) four things are made safe here:

- It quantizes in fp32, and moving averages stay in fp32, whatever the model is cast to: bf16 flips codes.
- Its codebooks average over all ranks only where the process group exists before they are built, and LFQ's entropy over
  ranks forgets what its all-reduce returns: both are set right at the time of the call.
- Its linear maps to the width of a code are ours, in the model's type: half-precision trainings have no fp32 weights.
- A forward pass that is run again for the backward pass would move the codes twice, and choose by other ones: refused.

Residual quantizers of the library subtract codes without gradient, so that the encoder's gradient is that of one
straight-through times their number.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import Function
from vector_quantize_pytorch import LFQ, ResidualFSQ, ResidualLFQ, ResidualVQ, VectorQuantize
from vector_quantize_pytorch import lookup_free_quantization as lfq
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from data_pipeline.errors import UsageError
from stpredict.layers.recomputing import recomputing
from stpredict.quantizers.config import (
    AveragedCodesConfig,
    GroupedResidualVqConfig,
    LfqConfig,
    MultiHeadVqConfig,
    ResidualFsqConfig,
    ResidualLfqConfig,
    ResidualVqConfig,
    VqConfig,
)


class PlugIn(nn.Module):
    """``(b, t, channels, h, w)`` → the same shape and type, and a loss: a scalar mean over locations and quantizers,
    None in evaluation and where there is none.

    ``layer`` takes fp32 ``(n, l, width)`` and returns as much, the numbers of codes in the axes of ``order``, and a
    loss if it has any. Stages s are what chooses a code each: quantizers, heads, groups.
    """

    #: How often each code was chosen in the last forward pass, int64 ``(stages, codes)``.
    uses: Tensor | None = None

    def __init__(self, layer: nn.Module, channels: int, width: int, codes: int, order: str = "n l"):
        super().__init__()
        same = width == channels
        self.project_in = nn.Identity() if same else nn.Linear(channels, width)
        self.layer = layer
        self.project_out = nn.Identity() if same else nn.Linear(width, channels)
        self.codes = codes
        leading, trailing = order.split("n l")
        self.to_stages = f"{order} -> ({leading}{trailing}) (n l)"
        self.averaging = [module for module in layer.modules() if isinstance(module, Codebook)]
        for codebook in self.averaging:
            codebook.all_reduce_fn = _sum_over_ranks
            # Whether k-means, which is off, is through: as a buffer, the GPU would be asked, and waited for.
            del codebook.initted
            codebook.initted = True

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.averaging and self.training and recomputing():
            raise ValueError(
                f"{type(self.layer).__name__} moved its codes in the forward pass and would choose others when it is "
                "run again: leave it out of what is recomputed"
            )
        vectors = self.project_in(rearrange(latents, "b t c h w -> (b t) (h w) c"))
        with torch.autocast(latents.device.type, enabled=False):
            quantized, numbers, *losses = self.layer(vectors.float())
        self.uses = _counted(rearrange(numbers, self.to_stages), self.codes)
        quantized = self.project_out(quantized.to(vectors.dtype))
        b, _, _, h, _ = latents.shape
        quantized = rearrange(quantized, "(b t) (h w) c -> b t c h w", b=b, h=h).to(latents.dtype)
        return quantized, losses[0].mean() if losses and self.training else None

    def _apply(self, fn, recurse: bool = True):
        """Floating-point buffers (codes, their averages) stay in fp32 where the model is cast to halves."""
        before = {(module, name): buffer for module in self.modules() for name, buffer in module._buffers.items()}
        super()._apply(fn, recurse)
        for (module, name), buffer in before.items():
            now = module._buffers[name]
            if buffer is not None and now.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = buffer.to(now.device)
        return self


class _Groups(nn.ModuleList):
    """A quantizer for each part of the channels. The library's own asks the GPU and all ranks for a random number in
    every step, which nothing here uses."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [layer(part) for layer, part in zip(self, x.chunk(len(self), dim=-1), strict=True)]
        quantized, numbers, losses = zip(*parts, strict=True)
        return torch.cat(quantized, dim=-1), torch.stack(numbers), torch.stack(losses)


def plug_in(config: AveragedCodesConfig | ResidualFsqConfig | LfqConfig | ResidualLfqConfig, channels: int) -> PlugIn:
    """UsageError where the channels cannot be cut into groups or heads."""
    match config:
        case VqConfig():
            return PlugIn(VectorQuantize(channels, **_averaged(config)), channels, channels, config.codebook_size)
        case MultiHeadVqConfig(heads=heads):
            each = config.code_channels or _cut(channels, heads, "heads")
            layer = VectorQuantize(heads * each, heads=heads, codebook_dim=each, **_averaged(config))
            return PlugIn(layer, channels, heads * each, config.codebook_size, "n l s" if heads > 1 else "n l")
        case ResidualVqConfig():
            layer = ResidualVQ(
                dim=channels,
                num_quantizers=config.quantizers,
                shared_codebook=config.shared,
                stochastic_sample_codes=config.stochastic,
                sample_codebook_temp=config.temperature,
                **_averaged(config),
            )
            return PlugIn(layer, channels, channels, config.codebook_size, "n l s")
        case GroupedResidualVqConfig(groups=groups):
            width = _cut(channels, groups, "groups")
            layer = _Groups(
                ResidualVQ(dim=width, num_quantizers=config.quantizers, **_averaged(config)) for _ in range(groups)
            )
            return PlugIn(layer, channels, channels, config.codebook_size, "g n l s")
        case ResidualFsqConfig():
            with torch.device("cpu"):  # it reads its levels while building, which fails on the meta device
                layer = ResidualFSQ(levels=list(config.levels), num_quantizers=config.quantizers)
            return PlugIn(layer, channels, len(config.levels), layer.codebook_size, "n l s")
        case ResidualLfqConfig():
            layer = ResidualLFQ(
                dim=_bits(config),
                codebook_size=config.codebook_size,
                num_quantizers=config.quantizers,
                entropy_loss_weight=config.entropy,
            )
            return PlugIn(layer, channels, _bits(config), config.codebook_size, "n l s")
        case LfqConfig():
            layer = LFQ(dim=_bits(config), codebook_size=config.codebook_size, entropy_loss_weight=config.entropy)
            return PlugIn(layer, channels, _bits(config), config.codebook_size)
    raise ValueError(f"no quantizer for {type(config).__name__}")


def _averaged(config: AveragedCodesConfig) -> dict[str, object]:
    """As at the time of the papers: straight-through rather than the later rotation of gradients."""
    return {
        "codebook_size": config.codebook_size,
        "decay": config.decay,
        "rotation_trick": False,
        "sync_codebook": False,  # PlugIn sees to it
    }


def _bits(config: LfqConfig) -> int:
    return config.codebook_size.bit_length() - 1


def _cut(channels: int, parts: int, what: str) -> int:
    if channels % parts:
        raise UsageError(f"quantizer.{what} {parts} does not divide the {channels} channels of the latents")
    return channels // parts


def _counted(numbers: Tensor, codes: int) -> Tensor:
    """Uses ``(stages, codes)`` of numbers ``(stages, n)``. Unlike bincount, without waiting for the GPU."""
    numbers = numbers.long()
    return numbers.new_zeros(len(numbers), codes).scatter_add_(1, numbers, torch.ones_like(numbers))


def _sum_over_ranks(tensor: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)


class _MeanOverRanks(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _MeanOverRanks.apply(gradient)


def mean_over_ranks(x: Tensor) -> Tensor:
    """With the gradients of all ranks' losses; ``x`` itself without other ranks."""
    return _MeanOverRanks.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


# What LFQ calls divides by the number of ranks and adds nothing up.
lfq.maybe_distributed_mean = mean_over_ranks
