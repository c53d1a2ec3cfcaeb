"""GPUs as an estimate needs them: memory, links, peaks; by the names that people use. Torch-free.

Memory and links are those of the vendor's datasheets (NVIDIA's, named in stpredict/training/gpu_peaks.py by model; of
the A10G a table of AWS's g5 instances). Memory is sold in GB and counted in GiB: an "80 GB" A100 has 80 x 2^30 bytes.
Those with GDDR6 that keep their check bits in it show less to programs, by default: 22.5 of 24, 45 of 48, 15 of 16.
"""

import difflib
import re
from dataclasses import dataclass

from data_pipeline.errors import UsageError
from stpredict.training.gpu_peaks import PEAKS, known_peak

GIB = 2**30
DEFAULT = "NVIDIA A100-SXM4-80GB"

# Name → (GiB, GB/s to other GPUs by NVLink or PCIe, GB/s to the host; both directions together, as datasheets give
# them). NVLink bridges, which join two PCIe cards, are not counted: eight ranks of a node talk over PCIe.
_PCIE3, _PCIE4, _PCIE5 = 32, 64, 128
_NVLINK_C2C = 900
_SHEETS: dict[str, tuple[float, float, float]] = {
    "Tesla V100-SXM2-16GB": (16, 300, _PCIE3),
    "Tesla V100-SXM2-32GB": (32, 300, _PCIE3),
    "Tesla V100-SXM3-32GB": (32, 300, _PCIE3),
    "Tesla V100-PCIE-16GB": (16, _PCIE3, _PCIE3),
    "Tesla V100-PCIE-32GB": (32, _PCIE3, _PCIE3),
    "Tesla V100S-PCIE-32GB": (32, _PCIE3, _PCIE3),
    "Tesla T4": (15, _PCIE3, _PCIE3),
    "NVIDIA A100-SXM4-40GB": (40, 600, _PCIE4),
    "NVIDIA A100-SXM4-80GB": (80, 600, _PCIE4),
    "NVIDIA A100-SXM-64GB": (64, 600, _PCIE4),
    "NVIDIA A100-PCIE-40GB": (40, _PCIE4, _PCIE4),
    "NVIDIA A100 80GB PCIe": (80, _PCIE4, _PCIE4),
    "NVIDIA H100 80GB HBM3": (80, 900, _PCIE5),
    "NVIDIA H100 PCIe": (80, _PCIE5, _PCIE5),
    "NVIDIA H100 NVL": (94, _PCIE5, _PCIE5),
    "NVIDIA GH200 480GB": (96, 900, _NVLINK_C2C),
    "NVIDIA H200": (141, 900, _PCIE5),
    "NVIDIA H200 NVL": (141, _PCIE5, _PCIE5),
    "NVIDIA B200": (180, 1800, _PCIE5),
    "NVIDIA A10": (22.5, _PCIE4, _PCIE4),
    "NVIDIA A10G": (22.5, _PCIE4, _PCIE4),
    "NVIDIA A40": (45, _PCIE4, _PCIE4),
    "NVIDIA L4": (22.5, _PCIE4, _PCIE4),
    "NVIDIA L40": (45, _PCIE4, _PCIE4),
    "NVIDIA L40S": (45, _PCIE4, _PCIE4),
    "NVIDIA RTX A6000": (48, _PCIE4, _PCIE4),
    "NVIDIA GeForce RTX 3080": (10, _PCIE4, _PCIE4),
    "NVIDIA GeForce RTX 3090": (24, _PCIE4, _PCIE4),
    "NVIDIA GeForce RTX 4090": (24, _PCIE4, _PCIE4),
    "NVIDIA RTX 6000 Ada Generation": (48, _PCIE4, _PCIE4),
}
# What people call them, where leaving out the vendor's words does not give it.
_SHORT = {
    "v100-16g": "Tesla V100-SXM2-16GB",
    "v100": "Tesla V100-SXM2-32GB",
    "v100-32g": "Tesla V100-SXM2-32GB",
    "v100-pcie": "Tesla V100-PCIE-32GB",
    "v100s": "Tesla V100S-PCIE-32GB",
    "t4": "Tesla T4",
    "a100": DEFAULT,
    "a100-40g": "NVIDIA A100-SXM4-40GB",
    "a100-64g": "NVIDIA A100-SXM-64GB",
    "a100-80g": DEFAULT,
    "a100-pcie-40g": "NVIDIA A100-PCIE-40GB",
    "a100-pcie": "NVIDIA A100 80GB PCIe",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h100-nvl": "NVIDIA H100 NVL",
    "gh200": "NVIDIA GH200 480GB",
    "h200": "NVIDIA H200",
    "h200-nvl": "NVIDIA H200 NVL",
    "b200": "NVIDIA B200",
    "a10": "NVIDIA A10",
    "a10g": "NVIDIA A10G",
    "a40": "NVIDIA A40",
    "a6000": "NVIDIA RTX A6000",
    "l4": "NVIDIA L4",
    "l40": "NVIDIA L40",
    "l40s": "NVIDIA L40S",
    "rtx3080": "NVIDIA GeForce RTX 3080",
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx6000-ada": "NVIDIA RTX 6000 Ada Generation",
}


@dataclass(frozen=True)
class Gpu:
    """``link_gb_s``: GB/s that one GPU sends to others of its node, in one direction; ``host_gb_s`` to and from the
    host's memory."""

    name: str
    memory_gib: float
    link_gb_s: float
    host_gb_s: float

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def link(self) -> str:
        return "NVLink" if self.link_gb_s > _PCIE5 / 2 else "PCIe"

    def precision(self, wanted: str) -> str:
        """What ``training.precision`` comes to on it. UsageError where it cannot compute so."""
        name = "bf16" if wanted == "auto" else wanted
        if known_peak(self.name, name) is None:
            raise UsageError(
                f"training.precision {wanted} is {name}, which {self.name} does not compute in: give "
                "training.precision=fp16 or fp32"
            )
        return name

    def tflops(self, precision: str) -> float:
        """Its peak, dense."""
        return known_peak(self.name, precision)


def find_gpu(name: str) -> Gpu:
    """By a short name (a100-80g), or as torch calls it. UsageError with the nearest for another."""
    short = {_plain(key): full for key, full in _SHORT.items()} | {_plain(full): full for full in PEAKS}
    full = short.get(_plain(name))
    if full is None:
        names = {_plain(key): key for key in _SHORT}
        near = [names[found] for found in difflib.get_close_matches(_plain(name), names, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_SHORT)}"
        raise UsageError(f"--gpu {name}: not known; {hint}")
    memory, link, host = _SHEETS[full]
    return Gpu(full, memory, link / 2, host / 2)


def all_gpus() -> list[Gpu]:
    return [find_gpu(name) for name in _SHEETS]


def short_name(gpu: Gpu) -> str:
    return next((short for short, full in _SHORT.items() if full == gpu.name), gpu.name)


def _plain(name: str) -> str:
    return re.sub(r"(\d)gb\b", r"\1g", re.sub(r"[\s_-]+", "", name.lower()))
