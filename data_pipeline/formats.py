"""What the members of a shard mean: videos to cut clips from, or token ids."""

import io
import json
from typing import Any

import numpy as np
import torch

from data_pipeline.config import ClipConfig
from data_pipeline.decode import DecodeError, VideoInfo, decode_clip
from data_pipeline.seeding import generator
from data_pipeline.sources.folder import EXTENSIONS
from data_pipeline.windows import Raw

_INFO = VideoInfo.__dataclass_fields__


class Clips:
    """KEY.mp4 (or another container) and KEY.json → one clip per key, its start drawn by (seed, epoch, key)."""

    def __init__(self, config: ClipConfig, seed: int):
        self._config, self._seed = config, seed

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        return [{"key": members["__key__"], "members": members}]

    def sample(self, raw: Raw, epoch: int) -> dict[str, Any]:
        """clip: uint8 tensor (t, h, w, c); label: the class's number, -1 where there is none; key."""
        members, key = raw["members"], raw["key"]
        encoded = next((members[extension] for extension in EXTENSIONS if extension in members), None)
        if encoded is None or "json" not in members:
            raise DecodeError(f"no .{'/.'.join(EXTENSIONS)} and .json of this key")
        about = json.loads(members["json"])
        info = VideoInfo(**{name: about[name] for name in _INFO})
        clip = decode_clip(encoded, self._config, generator("clip", self._seed, epoch, key), info)
        return {"clip": torch.from_numpy(clip), "label": about["class"], "key": key}


class Latents:
    """KEY.npy (n, T', H', W') and KEY.json (keys, labels) → n samples."""

    def unpack(self, members: dict[str, Any]) -> list[Raw]:
        try:
            about, tokens = json.loads(members["json"]), np.load(io.BytesIO(members["npy"]), allow_pickle=False)
            rows = zip(about["keys"], about["labels"], tokens, strict=True)
            return [{"key": key, "label": label, "latent": row} for key, label, row in rows]
        except (KeyError, ValueError, EOFError):  # damaged; a member is a window, so all of its samples are missing
            return []

    def sample(self, raw: Raw, epoch: int) -> dict[str, Any]:
        """latent: int64 tensor (T', H', W'); label: -1 where there is none; key: of the clip."""
        return {"latent": torch.from_numpy(raw["latent"].astype(np.int64)), "label": raw["label"], "key": raw["key"]}
