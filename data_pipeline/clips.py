"""Where a clip is cut from a video, in time and in space: one plan per clip, the same for all its frames. Torch-free.

A plan is four numbers drawn before anything is known of the video, so that the same generator gives the same clip
whatever decodes it, and a sample that fails moves no other.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline.config import ClipConfig
from data_pipeline.errors import DecodeError

# Matroska keeps whole milliseconds, and both the first frame's time and any other's are rounded: a frame may seem to
# come that much too late.
CLOCK_SLACK = 1e-3

Part = tuple[int, int]  # (i, n): the i-th of n clips of a video, each in its own of n equal parts


@dataclass(frozen=True)
class Plan:
    """What chance decides about a clip; each in [0, 1)."""

    start: float
    top: float
    left: float
    mirror: float

    @classmethod
    def draw(cls, rng: np.random.Generator, config: ClipConfig) -> "Plan":
        """Always four draws, in this order. The place of a crop is used only where the config wants it random."""
        start, top, left, mirror = rng.random(4)
        return cls(start, top, left, mirror) if config.crop == "random" else cls(start, 0.5, 0.5, mirror)

    def mirrored(self, clip: np.ndarray, config: ClipConfig) -> np.ndarray:
        """``clip`` (t, h, w, c), left and right exchanged in every other clip where ``config.flip``."""
        return np.ascontiguousarray(clip[:, :, ::-1]) if config.flip and self.mirror < 0.5 else clip


def clip_indices(frames: int, config: ClipConfig, where: float, part: Part = (0, 1)) -> range:
    """Frame numbers of a clip in a video of ``frames`` frames; ``where`` in [0, 1) places a random start.

    The possible starts are cut into ``part[1]`` equal parts; the clip starts in part ``part[0]``. DecodeError if the
    video is too short.
    """
    span = (config.frames - 1) * config.stride + 1
    if frames < span:
        raise DecodeError(f"{frames} frames found, {span} needed ({config.frames} frames, {config.stride} apart)")
    index, parts = part
    starts = frames - span + 1
    low, high = index * starts // parts, (index + 1) * starts // parts
    room = max(high - low, 1) - 1  # there may be fewer starts than parts
    start = low + {"first": 0, "centre": room // 2, "random": int(where * (room + 1))}[config.start]
    return range(start, start + span, config.stride)


def shown_frames(times: np.ndarray, video_fps: float, fps: float) -> np.ndarray:
    """What a player that refreshes ``fps`` times a second shows: the frame's number at each refresh, int64 (n,).

    At time t that is the last frame whose time is <= t. ``times`` in seconds, ascending, float64 (frames,); the last
    frame stays for 1 / ``video_fps``.
    """
    times = times - times[0]
    stays = 1 / video_fps if video_fps else 0.0
    refreshes = np.arange(max(1, np.ceil((times[-1] + stays - CLOCK_SLACK) * fps))) / fps
    return np.searchsorted(times, refreshes + CLOCK_SLACK, side="right") - 1


def cut_box(height: int, width: int, config: ClipConfig, plan: Plan) -> tuple[float, float, float, float]:
    """The part of a frame that becomes the clip's: left, top, right, bottom in pixels of the frame."""
    if config.resize == "stretch":
        return 0.0, 0.0, float(width), float(height)
    rows, columns = config.size
    scale = min(height / rows, width / columns)
    if config.short_side is not None:
        scale = min(height, width) / config.short_side
    box_height, box_width = rows * scale, columns * scale
    left, top = (width - box_width) * plan.left, (height - box_height) * plan.top
    return left, top, left + box_width, top + box_height


def fit_frame(frame: np.ndarray, config: ClipConfig, plan: Plan) -> np.ndarray:
    """uint8 (h, w, 1 or 3) → uint8 (*config.size, config.channels): antialiased bilinear, in one pass with the crop.

    Each frame goes by its own size: some videos change theirs midway.
    """
    height, width, channels = frame.shape
    rows, columns = config.size
    box = cut_box(height, width, config, plan)
    whole = (height, width) == (rows, columns) and box == (0, 0, width, height)
    if whole and channels == config.channels:
        return frame
    image = Image.fromarray(frame if channels == 3 else frame[..., 0])
    if not whole:
        image = image.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    fitted = np.asarray(image.convert("L" if config.channels == 1 else "RGB"))
    return fitted[..., None] if config.channels == 1 else fitted
