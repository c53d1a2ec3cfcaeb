"""A picture of a clip shard set: a row per video, spread over the shards; frames from left to right."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.config import ClipConfig
from data_pipeline.decode import DecodeError, VideoInfo, decode_clip
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.sources.folder import EXTENSIONS

TILE, CAPTION = 96, 14  # pixels


def contact_sheet(folder: str | Path, columns: int = 8, rows: int = 8) -> Image.Image:
    """``rows`` videos, or fewer where the set has fewer, with ``columns`` frames of each from its first to its last.

    UsageError if ``folder`` is no clip shard set, UserError if no video in it can be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind != "clips":
        raise UsageError(f"{folder}: holds {manifest.kind}; only clips have a picture")
    strips = []
    for key, encoded, about in _videos(folder, manifest, rows):
        try:
            strips.append(_strip(encoded, about, columns, f"{key}  {about['label'] or ''}"))
        except DecodeError:
            continue
        if len(strips) == rows:
            break
    if not strips:
        raise UserError(f"{folder}: no video can be read; `stpredict inspect --verify` checks the shards")
    sheet = Image.new("RGB", (columns * TILE, len(strips) * (TILE + CAPTION)), "white")
    for row, strip in enumerate(strips):
        sheet.paste(strip, (0, row * (TILE + CAPTION)))
    return sheet


def _strip(encoded: bytes, about: dict, columns: int, caption: str) -> Image.Image:
    """A caption above ``columns`` evenly spaced frames; a shorter video repeats none and leaves the rest white."""
    info = VideoInfo(**{name: about[name] for name in VideoInfo.__dataclass_fields__})
    shown = min(columns, info.frames)
    stride = max(1, (info.frames - 1) // max(1, shown - 1))
    clip = ClipConfig(frames=shown, size=(TILE, TILE), stride=stride, start="first")
    frames = decode_clip(encoded, clip, np.random.default_rng(0), info)
    strip = Image.new("RGB", (columns * TILE, TILE + CAPTION), "white")
    strip.paste(Image.fromarray(np.concatenate(list(frames), axis=1)), (0, CAPTION))
    ImageDraw.Draw(strip).text((2, 1), caption, fill="black")
    return strip


def _videos(folder: Path, manifest: Manifest, wanted: int) -> Iterator[tuple[str, bytes, dict]]:
    """First one video of ``wanted`` shards, evenly apart, then more of the same shards: key, bytes, KEY.json."""
    import webdataset  # here, because it imports torch

    shards = [manifest.shards[i] for i in np.unique(np.linspace(0, len(manifest.shards) - 1, wanted).astype(int))]
    readers = [
        iter(webdataset.WebDataset(str(folder / f"{shard.name}.tar"), shardshuffle=False, empty_check=False))
        for shard in shards
    ]
    while readers:
        for reader in list(readers):
            sample = next(reader, None)
            if sample is None:
                readers.remove(reader)
                continue
            encoded = next(sample[extension] for extension in EXTENSIONS if extension in sample)
            yield sample["__key__"], encoded, json.loads(sample["json"])
