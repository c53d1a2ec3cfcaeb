"""What GPUs can do at most, in TFLOP/s of dense matrix products: what MFU is a share of. Torch-free.

Vendors like to print twice these numbers, with structured sparsity; halved here.
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """None where the hardware has no such product: V100 and T4 only emulate bf16, and know no TF32."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


_V100_SXM = Peak(None, 125, None, 15.7)
_V100_PCIE = Peak(None, 112, None, 14)
_A100 = Peak(312, 312, 156, 19.5)
_H100_SXM = Peak(989.4, 989.4, 494.7, 66.9)
_H100_NVL = Peak(835.5, 835.5, 417.5, 60)

# By the name that torch.cuda.get_device_name gives.
PEAKS = {
    # NVIDIA V100 datasheet (2020); V100S: same page.
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-SXM3-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": Peak(None, 130, None, 16.4),
    # NVIDIA T4 datasheet.
    "Tesla T4": Peak(None, 65, None, 8.1),
    # NVIDIA A100 datasheet (2021): the same compute in every form.
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM-64GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    # NVIDIA H100 architecture whitepaper (2022), table 2, and the datasheet of the NVL.
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": Peak(756, 756, 378, 51.2),
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA GH200 480GB": _H100_SXM,  # NVIDIA GH200 datasheet
    # NVIDIA H200 datasheet (2024): the compute of an H100.
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    # NVIDIA HGX B200 datasheet, an eighth of the board's numbers.
    "NVIDIA B200": Peak(2250, 2250, 1125, 75),
    # NVIDIA A10, A40 and L4, L40, L40S datasheets.
    "NVIDIA A10": Peak(125, 125, 62.5, 31.2),
    "NVIDIA A10G": Peak(70, 70, 35, 35),  # Amazon's variant: a table of AWS's g5 instances' GPU
    "NVIDIA A40": Peak(149.7, 149.7, 74.8, 37.4),
    "NVIDIA L4": Peak(121, 121, 60, 30.3),
    "NVIDIA L40": Peak(181.05, 181.05, 90.5, 90.5),
    "NVIDIA L40S": Peak(362.05, 362.05, 183, 91.6),
    # NVIDIA Ampere GA102 whitepaper, tables 5 and 6 (fp32 accumulation), and Ada whitepaper, tables 2 and 4.
    "NVIDIA RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    "NVIDIA GeForce RTX 3080": Peak(59.5, 59.5, 29.8, 29.8),
    "NVIDIA GeForce RTX 3090": Peak(71, 71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    "NVIDIA RTX 6000 Ada Generation": Peak(364.2, 364.2, 182.1, 91.1),
}


def known_peak(gpu: str, precision: str) -> float | None:
    """TFLOP/s of the GPU called ``gpu`` in ``bf16``, ``fp16``, ``tf32`` or ``fp32``; None where it is not known."""
    peak = PEAKS.get(gpu)
    return getattr(peak, precision) if peak else None
