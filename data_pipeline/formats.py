"""What the members of a shard mean: videos to cut clips from, or token ids."""

import gzip
import json
import zlib
from math import prod
from typing import Any

import numpy as np
import torch

from data_pipeline.arrays import cut_array, load_array, read_npy
from data_pipeline.config import ClipConfig
from data_pipeline.decode import DecodeError, VideoInfo, decode_clip
from data_pipeline.manifest import Manifest
from data_pipeline.seeding import generator
from data_pipeline.sources.folder import EXTENSIONS
from data_pipeline.windows import Raw

_INFO = VideoInfo.__dataclass_fields__


class Clips:
    """KEY.mp4 (or another container) or KEY.npy, and KEY.json → ``config.per_video`` clips per key, each cut by
    (seed, epoch, key, number of the clip)."""

    def __init__(self, config: ClipConfig, seed: int):
        self._config, self._seed = config, seed
        self.per_count = config.per_video

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        return [{"key": members["__key__"], "members": members}]

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        """clip: array (t, h, w, c), uint8 but for float arrays; label: the class's number, -1 where there is none;
        key: KEY, or KEY-0, KEY-1, … where there are several clips per video."""
        members, key = raw["members"], raw["key"]
        if key.startswith("/") or ".." in key.split("/"):
            raise DecodeError("a key that leads out of its folder")
        if "json" not in members:
            raise DecodeError("its .json is missing")
        try:
            about = json.loads(members["json"])
            label = about["class"]
        except (ValueError, KeyError) as error:
            raise DecodeError(f"its .json is damaged: {error}") from None
        rng = generator("clip", self._seed, epoch, key, *((part,) if part else ()))
        where = (part, self.per_count)
        if "npy" in members:
            clip = cut_array(load_array(members["npy"]), self._config, rng, where)
        else:
            encoded = next((members[extension] for extension in EXTENSIONS if extension in members), None)
            if encoded is None:
                raise DecodeError(f"no .npy/.{'/.'.join(EXTENSIONS)} of this key")
            info = VideoInfo(**{name: about[name] for name in _INFO}) if _INFO.keys() <= about.keys() else None
            clip = decode_clip(encoded, self._config, rng, info, where)
        name = f"{key}-{part}" if self.per_count > 1 else key
        return {"clip": clip, "label": label, "key": name}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def array_bytes(self, manifest: Manifest) -> int:
        values = self._config.frames * prod(self._config.size)
        return 4 * values * len(manifest.moments.mean) if manifest.moments else values * self._config.channels


class Latents:
    """KEY.npy (n, …) and KEY.json.gz (keys, labels, values) → n samples."""

    per_count = 1

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        try:
            about = json.loads(gzip.decompress(members["json.gz"]))
            stored = read_npy(members["npy"])
            if about["values"] == "bfloat16":
                stored = stored.view(np.int16)  # ids are unsigned: so finish tells them apart
            rows = zip(about["keys"], about["labels"], stored, strict=True)
            return [{"latent": row, "label": label, "key": key} for key, label, row in rows]
        except (DecodeError, KeyError, ValueError, EOFError, OSError, zlib.error):  # damaged: all its samples are lost
            return []

    def sample(self, raw: Raw, epoch: int, part: int) -> dict[str, Any]:
        """latent: array (T', H', W') of ids or (C, T', H', W') of bfloat16's bits; label: -1 where there is none; key:
        of the clip."""
        return raw

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """latent: int64 (b, T', H', W') or bfloat16 (b, C, T', H', W')."""
        stored = batch["latent"]
        return batch | {"latent": stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored.long()}

    def array_bytes(self, manifest: Manifest) -> int:
        itemsize = 2 if manifest.dtype == "bfloat16" else np.dtype(manifest.dtype).itemsize
        return prod(manifest.grid) * (manifest.latent_channels or 1) * itemsize
