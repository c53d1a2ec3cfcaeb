"""What the members of a shard mean: videos to cut clips from, or token ids."""

import gzip
import json
import operator
import zlib
from math import prod
from typing import Any

import numpy as np
import torch

from data_pipeline import key_json
from data_pipeline.arrays import cut_array, load_array, read_npy
from data_pipeline.clips import Plan, clip_indices
from data_pipeline.config import ClipConfig
from data_pipeline.decode import EXTENSIONS, decode_clip
from data_pipeline.errors import DecodeError
from data_pipeline.manifest import Manifest
from data_pipeline.seeding import generator
from data_pipeline.windows import Raw


class Clips:
    """KEY.mp4 (or another container) or KEY.npy, and KEY.json → ``config.per_video`` clips per key, each cut by
    (seed, epoch, key, number of the clip)."""

    def __init__(self, config: ClipConfig, seed: int, manifest: Manifest):
        self._config, self._seed = config, seed
        self._dtype = np.dtype(manifest.dtype)
        channels = len(manifest.moments.mean) if manifest.moments else config.channels
        self._shape = (config.frames, *config.size, channels)
        self.per_count, self.array_bytes = config.per_video, prod(self._shape) * self._dtype.itemsize

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        return [{"key": members["__key__"], "members": members}]

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        """clip: array (t, h, w, c), uint8 but for float arrays; label: the class's number, -1 where there is none;
        key: KEY, or KEY-0, KEY-1, … where there are several clips per video; where the .json says when the array
        begins, minutes: of each frame since 1970, list[int]."""
        members, key = raw["members"], raw["key"]
        if "json" not in members:
            raise DecodeError("its .json is missing")
        about = key_json.parse(members["json"])
        label = key_json.class_of(about)
        rng = generator("clip", self._seed, epoch, key, *((part,) if part else ()))
        where = (part, self.per_count)
        times = {}
        if "npy" in members:
            array = load_array(members["npy"])
            if "time" in about and len(array) > 1:
                again = generator("clip", self._seed, epoch, key, *((part,) if part else ()))
                cut = clip_indices(len(array), self._config, Plan.draw(again, self._config).start, where)
                times = {"minutes": key_json.minutes(about, len(array))[cut.start : cut.stop : cut.step]}
            clip = cut_array(array, self._config, rng, where)
        else:
            encoded = next((members[extension] for extension in EXTENSIONS if extension in members), None)
            if encoded is None:
                raise DecodeError(f"no .npy/.{'/.'.join(EXTENSIONS)} of this key")
            clip = decode_clip(encoded, self._config, rng, key_json.video_info(about), where)
        _expect(clip, self._dtype, self._shape)
        name = f"{key}-{part}" if self.per_count > 1 else key
        return {"clip": clip, "label": label, "key": name, **times}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


class Latents:
    """KEY.npy (n, …) and KEY.json.gz (keys, labels, values) → n samples."""

    per_count = 1

    def __init__(self, manifest: Manifest):
        # Ids are unsigned, the bits of bfloat16 are viewed as signed: so ``finish`` tells them apart.
        self._dtype = np.dtype(np.int16 if manifest.dtype == "bfloat16" else manifest.dtype)
        self._shape = (*([manifest.latent_channels] if manifest.latent_channels else []), *manifest.grid)
        self.array_bytes = prod(self._shape) * self._dtype.itemsize

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        try:
            about = json.loads(gzip.decompress(members["json.gz"]))
            stored = read_npy(members["npy"])
            if about["values"] == "bfloat16":
                stored = stored.view(np.int16)
            rows = zip(about["keys"], about["labels"], stored, strict=True)
            return [{"latent": row, "label": operator.index(label), "key": key} for key, label, row in rows]
        except (DecodeError, KeyError, ValueError, TypeError, EOFError, OSError, zlib.error):  # damaged: all are lost
            return []

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        """latent: array (T', H', W') of ids or (C, T', H', W') of bfloat16's bits; label: -1 where there is none; key:
        of the clip."""
        _expect(raw["latent"], self._dtype, self._shape)
        return raw

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """latent: int64 (b, T', H', W') or bfloat16 (b, C, T', H', W')."""
        stored = batch["latent"]
        return batch | {"latent": stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored.long()}


def _expect(array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """DecodeError if a sample is not of the type and shape that its set has."""
    if array.dtype != dtype or array.shape != shape:
        raise DecodeError(f"{array.dtype} {array.shape} where the set has {dtype} {shape}")
