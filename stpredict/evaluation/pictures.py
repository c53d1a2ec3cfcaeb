"""Clips side by side, labelled, for people to look at."""

import numpy as np
from PIL import Image, ImageDraw

LABEL_HEIGHT = 14
FONT_SIZE = 10  # smaller where the name is wider than its clip


def side_by_side(clips: dict[str, np.ndarray], scale: int = 1) -> np.ndarray:
    """Clips uint8 ``(t, h, w, c)`` of equal shape in one row under their names: uint8 ``(t, h', w', 3)``."""
    columns = []
    for name, clip in clips.items():
        clip = np.repeat(clip, 3, axis=-1) if clip.shape[-1] == 1 else clip
        clip = clip.repeat(scale, axis=1).repeat(scale, axis=2)
        columns.append(_with_label(name, clip))
    gap = np.full((*columns[0].shape[:2], 4, 3), 255, np.uint8)
    return np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=2)


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Rows uint8 ``(t, h, w, 3)`` of equal shape under each other."""
    gap = np.full((rows[0].shape[0], 4, *rows[0].shape[2:]), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1], axis=1)


def class_grid(rows: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Clips uint8 ``(t, h, w, c)`` of equal shape, a row for each name: uint8 ``(t, h', w', 3)``."""
    made = []
    for name, clips in rows.items():
        shown = [np.repeat(clip, 3, axis=-1) if clip.shape[-1] == 1 else clip for clip in clips]
        gap = np.full((*shown[0].shape[:2], 2, 3), 255, np.uint8)
        made.append(_with_label(name, np.concatenate([part for clip in shown for part in (clip, gap)][:-1], axis=2)))
    return stacked(made)


def film_strip(clip: np.ndarray, frames: int = 4) -> np.ndarray:
    """So many frames of a clip ``(t, h, w, c)``, from the first to the last, side by side: ``(1, h, w', c)``."""
    chosen = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate([clip[number : number + 1] for number in chosen], axis=2)


def _with_label(name: str, clip: np.ndarray) -> np.ndarray:
    label = Image.new("RGB", (clip.shape[2], LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(label)
    room, needed = clip.shape[2] - 4, draw.textlength(name, font_size=FONT_SIZE)
    draw.text((2, 1), name, fill="black", font_size=FONT_SIZE * min(1, room / needed))
    band = np.broadcast_to(np.asarray(label), (len(clip), LABEL_HEIGHT, clip.shape[2], 3))
    return np.concatenate([band, clip], axis=1)
