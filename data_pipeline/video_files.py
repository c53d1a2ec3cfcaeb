"""uint8 clip → .mp4 or .gif. Written under a temporary name and renamed, so that no half file bears the final name."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipeline.disk import renamed


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, crf: int = 18) -> None:
    """Writes ``frames``, uint8 (t, h, w, 3), as H.264 in yuv420p, which every browser plays.

    The format wants even sizes: an odd height or width gains one repeated row or column. ``crf`` is x264's quality,
    0 (lossless) to 51.
    """
    _check(frames)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with renamed(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The same bytes every time and everywhere: without cpu-independent about one small video in five differs.
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_gif(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes ``frames``, uint8 (t, h, w, 3), as an endless GIF."""
    _check(frames)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    with renamed(Path(path)) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"expected uint8 frames (t, h, w, 3), got {frames.dtype} {frames.shape}")
