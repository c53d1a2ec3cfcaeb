"""Files of weights that others wrote."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import UsageError


def read_weights(path: Path, key: str) -> dict[str, Any]:
    """By name, of a .safetensors file or one of torch.save, which may hold other things besides: on the CPU.

    UsageError, which begins with ``key``, where it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{key}: {path} is not there") from None
    except UnpicklingError:  # torch's own words begin with advice to load it unsafely
        raise UsageError(f"{key}: {path} cannot be read as weights: torch.save wrote no tensors alone") from None
    except (OSError, RuntimeError, SafetensorError, EOFError) as error:
        raise UsageError(f"{key}: {path} cannot be read as weights: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{key}: {path} holds a {type(found).__name__}, not weights by name")
    return found


def place(weights: dict[str, Tensor], model: nn.Module, where: str) -> None:
    """Gives ``model``, which is on the meta device, those of ``weights`` that it has. UsageError where one is missing
    or has another shape."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        found = weights.get(name)
        if not torch.is_tensor(found) or found.shape != tensor.shape:
            has = f"is {tuple(found.shape)}" if torch.is_tensor(found) else "is missing"
            raise UsageError(f"{where}: {name} {has}, {tuple(tensor.shape)} is needed; give weights of that layout")
    model.load_state_dict({name: weights[name].float() for name in wanted}, assign=True)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
