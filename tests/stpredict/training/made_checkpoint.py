"""Checkpoints that no training has made."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stpredict.training.checkpoint import (
    CheckpointState,
    Written,
    build_index,
    folder_of,
    piece_name,
    random_file,
    rank_file,
    write_complete,
)
from stpredict.training.saving import SAFETENSORS_TYPES


def make_checkpoint(
    checkpoints: Path, tensors: dict[str, Tensor], step: int = 10, ranks: int = 2, **state: Any
) -> Path:
    """A complete checkpoint of ``tensors``, by key; each rank holds a part of each. ``state`` changes its state."""
    folder = folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    held, files = [], {}
    for rank in range(ranks):
        parts = {}
        for key, tensor in tensors.items():
            length = -(-tensor.numel() // ranks)
            start, stop = rank * length, min((rank + 1) * length, tensor.numel())
            if start < stop:
                parts[key] = (start, stop, tensor.reshape(-1)[start:stop])
        held.append([(key, tensors[key].shape, SAFETENSORS_TYPES[p.dtype], a, b) for key, (a, b, p) in parts.items()])
        save_file({piece_name(key, start): part for key, (start, _, part) in parts.items()}, folder / rank_file(rank))
        torch.save({}, folder / random_file(rank))
        for path in (folder / rank_file(rank), folder / random_file(rank)):
            with path.open("rb") as file:
                files[path.name] = Written(
                    bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
                )
    whole = {
        "step": step,
        "samples_consumed": {"main": 8 * step},
        "quarantined": {},
        "world_size": ranks,
        "zero_stage": 3,
        "precision": "bf16",
        "optimizer_steps": {"model": step},
        "config": {},
        "export": {},
        **state,
    }
    write_complete(folder, CheckpointState(**whole), build_index(held), files)
    return folder


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
