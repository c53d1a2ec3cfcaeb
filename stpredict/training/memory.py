"""Memory that this rank uses and that its machine has left, in GB (10**9 bytes)."""

import psutil
import torch

GB = 1e9


def memory(device: torch.device) -> dict[str, float]:
    """``rss_gb``, this process's resident set (data workers have their own), and ``host_free_gb``; on CUDA also the
    most that torch had allocated, and reserved, since the last call."""
    values = {
        "rss_gb": psutil.Process().memory_info().rss / GB,
        "host_free_gb": psutil.virtual_memory().available / GB,
    }
    if device.type == "cuda":
        values["gpu_allocated_gb"] = torch.cuda.max_memory_allocated(device) / GB
        values["gpu_reserved_gb"] = torch.cuda.max_memory_reserved(device) / GB
        torch.cuda.reset_peak_memory_stats(device)
    return values
