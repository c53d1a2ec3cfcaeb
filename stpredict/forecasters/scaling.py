"""Between stored values, frames in grey levels or fields in physical units, and what forecasters see."""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from data_pipeline.config import Location
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, find_manifest
from data_pipeline.shard_set import read_set
from data_pipeline.storage import child, expand
from stpredict.forecasters.config import (
    AffineScaling,
    AnyScaling,
    ForecasterDataConfig,
    StandardScaling,
    UnitScaling,
)


@dataclass(frozen=True)
class Scaling:
    """``(x - offset) / scale``, one of each for every channel; names and units of the channels where they have such."""

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    channels: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    def scaled(self, clip: Tensor) -> Tensor:
        """Stored values ``(b, t, h, w, c)`` to fp32 ``(b, c, t, h, w)``."""
        offset, scale = self._tensors(clip.device)
        return rearrange((clip.float() - offset) / scale, "b t h w c -> b c t h w")

    def physical(self, frames: Tensor) -> Tensor:
        """Back: ``(b, c, t, h, w)`` to fp32 ``(b, t, h, w, c)`` in stored units, neither clipped nor rounded."""
        offset, scale = self._tensors(frames.device)
        return rearrange(frames.float(), "b c t h w -> b t h w c") * scale + offset

    def of_channels(self, device: torch.device) -> Tensor:
        """``scale`` as it broadcasts with ``(b, c, t, h, w)``: by which errors become physical."""
        return rearrange(self._tensors(device)[1], "c -> c 1 1 1")

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # From pinned memory, since a step would wait for all that the GPU has yet to do before it.
        both = torch.tensor([self.offset, self.scale], pin_memory=device.type == "cuda")
        offset, scale = both.to(device, non_blocking=True)
        return offset, scale


def scaling_of(config: AnyScaling | None, channels: int, where: str, manifest: Manifest) -> Scaling:
    """For a set of shards. UsageError where it has other channels, or not the statistics."""
    field = manifest.dtype == "float32"
    if field and manifest.moments is None:
        raise UsageError(f"{where}: a field without statistics: its manifest has no `moments`; make the shards again")
    held = len(manifest.moments.mean) if field else channels
    if held != channels or (not field and channels not in (1, 3)):
        called = f" ({', '.join(manifest.channels)})" if manifest.channels else ""
        has = f"{held} channels{called}" if field else "video of 1 or 3 channels"
        raise UsageError(f"{where}: holds {has}, model.channels is {channels}")
    names = tuple(manifest.channels), tuple(manifest.units)
    match config or (StandardScaling() if field else UnitScaling()):
        case UnitScaling():
            if field:
                raise UsageError(f"{where}: data.scaling unit is for uint8, the set holds float32; take standard")
            return of_grey_levels(channels)
        case StandardScaling():
            if not field:
                raise UsageError(f"{where}: data.scaling standard is for fields, the set holds uint8; take unit")
            moments = manifest.moments
            deviations = [(m2 / moments.count) ** 0.5 for m2 in moments.m2]
            if 0.0 in deviations:
                number = deviations.index(0.0)
                name = manifest.channels[number] if manifest.channels else f"number {number}"
                raise UsageError(f"{where}: channel {name} is the same everywhere; leave it out, or scale by affine")
            return Scaling(tuple(moments.mean), tuple(deviations), *names)
        case AffineScaling() as affine:
            return as_given(affine, channels, *names)


def of_grey_levels(channels: int) -> Scaling:
    """Of uint8 to [0, 1]."""
    return Scaling((0.0,) * channels, (255.0,) * channels)


def as_given(config: AffineScaling, channels: int, *names: tuple[str, ...]) -> Scaling:
    """UsageError where there are values for another number of channels."""
    for name, values in (("offset", config.offset), ("scale", config.scale)):
        if len(values) not in (1, channels):
            raise UsageError(f"data.scaling.{name}: {len(values)} values for {channels} channels")
    return Scaling(
        config.offset * (channels // len(config.offset)), config.scale * (channels // len(config.scale)), *names
    )


def read_scalings(data: ForecasterDataConfig, channels: int) -> tuple[Scaling, Scaling]:
    """Of the training and of the validation split. UsageError where one is missing or unfit."""
    of_training, of_held_out = (
        scaling_of(
            data.scaling, channels, f"{data.shards}/{split}", read_manifest_of(data.shards, split, data.made_with)
        )
        for split in ("train", data.validation)
    )
    own = isinstance(data.scaling, StandardScaling) and data.scaling.statistics == "own"
    return of_training, of_held_out if own else of_training


def read_manifest_of(shards: Location | Path, split: str, made_with: str | None) -> Manifest:
    """UsageError, which says how such shards are made where that is known, where there are none."""
    where = child(shards, split)
    if made_with and split != "test" and any(find_manifest(folder) is None for folder in expand(where)):
        raise UsageError(f"{where}: no shard set here; {made_with}")
    return read_set(shards, split).manifest
