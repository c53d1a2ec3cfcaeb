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


def _with_label(name: str, clip: np.ndarray) -> np.ndarray:
    label = Image.new("RGB", (clip.shape[2], LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(label)
    room, needed = clip.shape[2] - 4, draw.textlength(name, font_size=FONT_SIZE)
    draw.text((2, 1), name, fill="black", font_size=FONT_SIZE * min(1, room / needed))
    band = np.broadcast_to(np.asarray(label), (len(clip), LABEL_HEIGHT, clip.shape[2], 3))
    return np.concatenate([band, clip], axis=1)
