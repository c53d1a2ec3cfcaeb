"""A picture of a clip shard set: a row per video or array, spread over the shards; frames from left to right.

Of arrays the first three channels are shown as colours, or the first one where there are fewer: uint8 as it is, fields
each channel from its least value in the row (black) to its greatest (white). Of fields whose channels have names, the
first ones have a row each instead, dark blue to yellow, with these two values and north at the top.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data_pipeline import key_json
from data_pipeline.arrays import load_array
from data_pipeline.config import ClipConfig
from data_pipeline.decode import EXTENSIONS, decode_clip, probe
from data_pipeline.errors import DecodeError, UsageError, UserError
from data_pipeline.manifest import Manifest, read_manifest

log = logging.getLogger(__name__)

TILE, CAPTION = 96, 14  # pixels
CHANNELS = 4  # of a sample


def contact_sheet(folder: str | Path, columns: int = 8, rows: int = 8) -> Image.Image:
    """``rows`` videos, or fewer where the set has fewer, with ``columns`` frames of each from its first to its last;
    of fields whose channels have names, ``rows`` channels of as many samples as that takes.

    UsageError if ``folder`` is no clip shard set, UserError if no video in it can be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind != "clips":
        raise UsageError(f"{folder}: holds {manifest.kind}; only clips have a picture")
    strips = []
    for sample in _samples(folder, manifest, rows):
        try:
            strips += _rows(sample, columns, manifest)
        except DecodeError as error:
            log.warning("%s: %s is not shown: %s", folder, sample["__key__"], error)
        if len(strips) >= rows:
            break
    strips = strips[:rows]
    if not strips:
        raise UserError(f"{folder}: no video can be read; `stpredict inspect --verify` checks the shards")
    sheet = Image.new("RGB", (columns * TILE, len(strips) * (TILE + CAPTION)), "white")
    for row, strip in enumerate(strips):
        sheet.paste(strip, (0, row * (TILE + CAPTION)))
    return sheet


def _rows(sample: dict[str, Any], columns: int, manifest: Manifest) -> list[Image.Image]:
    """One row, or one of each channel. DecodeError if a member of ``sample``, as WebDataset gives it, is missing or
    damaged."""
    extension = next((extension for extension in ("npy", *EXTENSIONS) if extension in sample), None)
    if extension is None or "json" not in sample:
        raise DecodeError("a member is missing")
    about = key_json.parse(sample["json"])
    data = sample[extension]
    caption = f"{sample['__key__']}  {about.get('label') or ''}"
    if extension == "npy" and manifest.channels and manifest.dtype == "float32":
        return [_strip(tiles, columns, f"{caption}{named}") for named, tiles in _channel_tiles(data, columns, manifest)]
    tiles = _array_tiles(data, columns) if extension == "npy" else _video_tiles(data, about, columns)
    return [_strip(tiles, columns, caption)]


def _video_tiles(encoded: bytes, about: dict[str, Any], columns: int) -> list[Image.Image]:
    info = key_json.video_info(about) or probe(encoded)
    shown, stride = _shown(info.frames, columns)
    clip = ClipConfig(frames=shown, size=(TILE, TILE), stride=stride, start="first")
    return [Image.fromarray(frame) for frame in decode_clip(encoded, clip, np.random.default_rng(0), info)]


def _array_tiles(encoded: bytes, columns: int) -> list[Image.Image]:
    array = load_array(encoded)
    shown, stride = _shown(len(array), columns)
    frames = array[::stride][:shown, ..., : 3 if array.shape[-1] >= 3 else 1]
    if frames.dtype != np.uint8:
        low, high = (edge(frames.astype(np.float64), axis=(0, 1, 2)) for edge in (np.min, np.max))
        frames = ((frames - low) * (255 / np.where(high > low, high - low, 1))).astype(np.uint8)
    images = [Image.fromarray(frame if frame.shape[-1] == 3 else frame[..., 0]).convert("RGB") for frame in frames]
    return [_tile(image) for image in images]


def _channel_tiles(encoded: bytes, columns: int, manifest: Manifest) -> Iterator[tuple[str, list[Image.Image]]]:
    """Of each channel that is shown what it is, and its tiles."""
    from matplotlib import colormaps

    field = load_array(encoded)
    if field.shape[-1] != len(manifest.channels):
        raise DecodeError(f"{field.shape[-1]} channels where the set has {len(manifest.channels)}")
    shown, stride = _shown(len(field), columns)
    latitudes = manifest.latitudes or []
    northward = len(latitudes) > 1 and latitudes[0] < latitudes[-1]
    units = manifest.units or [""] * len(manifest.channels)
    for channel, (name, unit) in enumerate(zip(manifest.channels[:CHANNELS], units, strict=False)):
        frames = field[::stride][:shown, :: -1 if northward else 1, :, channel].astype(np.float64)
        low, high = frames.min(), frames.max()
        levels = (frames - low) / (high - low) if high > low else np.zeros_like(frames)
        colours = colormaps["viridis"](levels, bytes=True)[..., :3]
        yield f"{name} {low:.4g} to {high:.4g} {unit}".rstrip(), [_framed(frame) for frame in colours]


def _tile(image: Image.Image, side: int = TILE) -> Image.Image:
    return ImageOps.pad(image, (side, side), Image.Resampling.NEAREST, color="white")


def _framed(frame: np.ndarray) -> Image.Image:
    """A tile with a white edge: a field seldom ends where the next one begins."""
    return ImageOps.expand(_tile(Image.fromarray(frame), TILE - 2), 1, "white")


def _shown(frames: int, columns: int) -> tuple[int, int]:
    """How many of ``frames`` frames are shown, and how far apart: from the first to the last, none twice."""
    shown = min(columns, frames)
    return shown, max(1, (frames - 1) // max(1, shown - 1))


def _strip(tiles: list[Image.Image], columns: int, caption: str) -> Image.Image:
    """A caption above the tiles; what a short video leaves stays white."""
    strip = Image.new("RGB", (columns * TILE, TILE + CAPTION), "white")
    for column, tile in enumerate(tiles):
        strip.paste(tile, (column * TILE, CAPTION))
    ImageDraw.Draw(strip).text((2, 1), caption, fill="black")
    return strip


def _samples(folder: Path, manifest: Manifest, wanted: int) -> Iterator[dict[str, Any]]:
    """First one sample of ``wanted`` shards, evenly apart, then more of the same shards, as WebDataset gives them.
    What a tar holds behind its damage is left out."""
    import webdataset  # here, because it imports torch

    damaged: set[str] = set()  # each is said once

    def tell(path: str, _error: Exception) -> bool:
        if path not in damaged:
            damaged.add(path)
            log.warning("%s cannot be read to its end", path)
        return True

    shards = [manifest.shards[i] for i in np.unique(np.linspace(0, len(manifest.shards) - 1, wanted).astype(int))]
    paths = [str(folder / f"{shard.name}.tar") for shard in shards]
    about = {"shardshuffle": False, "empty_check": False}
    readers = [iter(webdataset.WebDataset(path, handler=partial(tell, path), **about)) for path in paths]
    while readers:
        for reader in list(readers):
            sample = next(reader, None)
            if sample is None:
                readers.remove(reader)
            else:
                yield sample
