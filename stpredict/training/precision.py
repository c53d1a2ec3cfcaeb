"""Which floating-point type to compute in."""

import torch


def cpu_bf16_is_real() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, a bf16 convolution is 30 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: str, device: torch.device, zero_stage: int = 2) -> torch.dtype:
    """``auto`` is bf16 on CUDA and on CPUs whose bf16 is real, else fp32; the others are what they say.

    ZeRO-0 keeps no fp32 master weights, so ``auto`` is fp32 there.
    """
    match precision:
        case "bf16":
            return torch.bfloat16
        case "fp32":
            return torch.float32
        case "auto":
            fast = device.type == "cuda" or cpu_bf16_is_real()
            return torch.bfloat16 if fast and zero_stage > 0 else torch.float32
    raise ValueError(f"unknown precision {precision!r}")
