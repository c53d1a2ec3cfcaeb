"""The same bits from the same steps, on CUDA too."""

import os

import torch


def make_deterministic() -> None:
    """Has torch take deterministic kernels only, for the rest of this process: slower on CUDA, and RuntimeError from
    torch where an operation has none. To be called before anything runs on a GPU, which cuBLAS then reads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
