"""Clips side by side, labelled, for people to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.video_files import write_gif, write_mp4

FPS = 8  # of the pictures: slow enough to compare
LABEL_HEIGHT = 14
FONT_SIZE = 10  # smaller where the name is wider than its clip


def side_by_side(clips: dict[str, np.ndarray], scale: int = 1) -> np.ndarray:
    """Clips uint8 ``(t, h, w, c)`` of equal shape in one row under their names: uint8 ``(t, h', w', 3)``."""
    larger = {name: _in_colour(clip).repeat(scale, axis=1).repeat(scale, axis=2) for name, clip in clips.items()}
    return _joined([_with_label(name, clip) for name, clip in larger.items()], axis=2, gap=4)


def write_side_by_side(folder: Path, keys: Sequence[str], clips: Mapping[str, np.ndarray]) -> None:
    """NUMBER_KEY.mp4 and .gif: of each name the clip of that number, from arrays uint8 ``(n, t, h, w, c)``."""
    for number, key in enumerate(keys):
        frames = side_by_side({name: array[number] for name, array in clips.items()}, scale=2)
        write_mp4(folder / f"{number:03d}_{key}.mp4", frames, FPS)
        write_gif(folder / f"{number:03d}_{key}.gif", frames, FPS)


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Rows uint8 ``(t, h, w, 3)`` of equal shape under each other."""
    return _joined(rows, axis=1, gap=4)


def class_grid(rows: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Clips uint8 ``(t, h, w, c)`` of equal shape, a row for each name: uint8 ``(t, h', w', 3)``."""
    joined = {name: _joined(list(map(_in_colour, clips)), axis=2, gap=2) for name, clips in rows.items()}
    return stacked([_with_label(name, row) for name, row in joined.items()])


def film_strip(clip: np.ndarray, frames: int = 4) -> np.ndarray:
    """So many frames of a clip ``(t, h, w, c)``, from the first to the last, side by side: ``(1, h, w', c)``."""
    chosen = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate([clip[number : number + 1] for number in chosen], axis=2)


def _in_colour(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip, 3, axis=-1) if clip.shape[-1] == 1 else clip


def _joined(parts: list[np.ndarray], axis: int, gap: int) -> np.ndarray:
    """With so many white pixels between them."""
    shape = list(parts[0].shape)
    shape[axis] = gap
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([one for part in parts for one in (part, white)][:-1], axis=axis)


def _with_label(name: str, clip: np.ndarray) -> np.ndarray:
    label = Image.new("RGB", (clip.shape[2], LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(label)
    room, needed = clip.shape[2] - 4, draw.textlength(name, font_size=FONT_SIZE)
    draw.text((2, 1), name, fill="black", font_size=FONT_SIZE * min(1, room / needed))
    band = np.broadcast_to(np.asarray(label), (len(clip), LABEL_HEIGHT, clip.shape[2], 3))
    return np.concatenate([band, clip], axis=1)
