"""Which floating-point type to compute in."""

import torch

from data_pipeline.errors import UsageError


def cpu_bf16_is_real() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, a bf16 convolution is 30 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: str, device: torch.device, zero_stage: int = 2) -> torch.dtype:
    """``auto`` is bf16 on CUDA and on CPUs whose bf16 is real, else fp32; the others are what they say.

    ZeRO-0 keeps no fp32 master weights, so ``auto`` is fp32 there. UsageError for bf16 at ZeRO-1: DeepSpeed's
    files of that pair cannot be gathered into full weights.
    """
    if zero_stage == 1 and resolve_precision(precision, device) == torch.bfloat16:
        raise UsageError(
            "training.zero_stage 1 in bf16 cannot be exported; use zero_stage=2 (no more memory, the same result), "
            "or precision=fp32"
        )
    match precision:
        case "bf16":
            return torch.bfloat16
        case "fp32":
            return torch.float32
        case "auto":
            fast = device.type == "cuda" or cpu_bf16_is_real()
            return torch.bfloat16 if fast and zero_stage > 0 else torch.float32
    raise ValueError(f"unknown precision {precision!r}")
