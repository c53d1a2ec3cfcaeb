"""Encoded video bytes → uint8 clip. Torch-free.

decord reads first: it seeks to the frames wanted, in one thread, with a reader that lives for one clip (it decodes
ahead of its consumer). PyAV reads what decord refuses (AV1, some odd containers). Frames are counted by number, so a
video of variable frame rate keeps its irregular times.
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UserError

Decoder = Literal["decord", "pyav"]


class DecodeError(UserError):
    """A video cannot be decoded, or is too short for the clip asked for."""


@dataclass(frozen=True)
class VideoInfo:
    """What a decoder finds in a video: ``frames`` that it can deliver, size in pixels as displayed."""

    frames: int
    fps: float
    height: int
    width: int
    decoder: Decoder


def decode_clip(
    encoded: bytes, config: ClipConfig, rng: np.random.Generator, info: VideoInfo | None = None
) -> np.ndarray:
    """One clip of a video: uint8 (t, h, w, c), RGB or luminance.

    ``rng`` is drawn from once, whatever happens, and is used when ``config.start`` is random. ``info``, from an
    earlier ``probe``, saves trying a decoder that is known to refuse and counting frames again.
    Raises DecodeError, naming the reason per decoder, where no decoder gives all the frames.
    """
    where = rng.random()
    failures = []
    for reader in _readers(info):
        try:
            video = reader(encoded, info.frames if info else None)
            wanted = clip_indices(video.frames, config, where)
            clip = np.stack([_resize(frame, config) for frame in video.read(wanted)])
        except Exception as error:  # decoders raise what they like on broken input
            failures.append(f"{reader.name}: {_one_line(error)}")
            continue
        return clip
    raise DecodeError("; ".join(failures))


def probe(video: bytes | str | Path) -> VideoInfo:
    """What there is to know of a video; its first and last frames are decoded. DecodeError if neither decoder can."""
    encoded = video if isinstance(video, bytes) else Path(video).read_bytes()
    failures = []
    for reader in _readers(None):
        try:
            opened = reader(encoded, None)
            if not opened.frames:
                raise DecodeError("no frames")
            *_, last = opened.read(sorted({0, opened.frames - 1}))
        except Exception as error:
            failures.append(f"{reader.name}: {_one_line(error)}")
            continue
        height, width, _ = last.shape
        return VideoInfo(opened.frames, opened.fps, height, width, reader.name)
    raise DecodeError("; ".join(failures))


def clip_indices(frames: int, config: ClipConfig, where: float) -> range:
    """Frame numbers of a clip in a video of ``frames`` frames; ``where`` in [0, 1) places a random start."""
    span = (config.frames - 1) * config.stride + 1
    if frames < span:
        raise DecodeError(f"{frames} frames found, {span} needed ({config.frames} frames, {config.stride} apart)")
    room = frames - span
    start = {"first": 0, "centre": room // 2, "random": int(where * (room + 1))}[config.start]
    return range(start, start + span, config.stride)


class _Reader(Protocol):
    name: Decoder
    frames: int
    fps: float

    def __init__(self, encoded: bytes, frames: int | None): ...

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames numbered ``wanted`` (ascending), uint8 (h, w, 3); raises if one is missing."""


class _DecordReader:
    name: Decoder = "decord"

    def __init__(self, encoded: bytes, frames: int | None):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        # A file in memory, not BytesIO: decord prints the name of what it cannot open, and of BytesIO every byte.
        with os.fdopen(os.memfd_create("video"), "wb") as file:
            file.write(encoded)
            file.flush()
            self._video = decord.VideoReader(f"/proc/self/fd/{file.fileno()}", ctx=decord.cpu(0), num_threads=1)
        self.frames = len(self._video)
        self.fps = float(self._video.get_avg_fps())

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        for index in wanted:
            yield self._video[index].asnumpy()


class _PyAVReader:
    """Decodes from the first frame on: containers that decord refuses seldom seek well."""

    name: Decoder = "pyav"

    def __init__(self, encoded: bytes, frames: int | None):
        self._encoded = encoded
        self.fps = 0.0
        self.frames = sum(1 for _ in self._decode()) if frames is None else frames

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        missing = set(wanted)
        for index, frame in enumerate(self._decode()):
            if index in missing:
                missing.remove(index)
                yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            if not missing:
                return
        raise DecodeError(f"frame {min(missing)} is missing")

    def _decode(self) -> Iterator:
        import av

        with av.open(io.BytesIO(self._encoded)) as container:
            if not container.streams.video:
                raise DecodeError("no video in the file")
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            self.fps = float(stream.average_rate or 0)
            yield from container.decode(stream)


def _readers(info: VideoInfo | None) -> tuple[type[_Reader], ...]:
    if info is not None and info.decoder == "pyav":
        return (_PyAVReader,)
    return (_DecordReader, _PyAVReader)


def _resize(frame: np.ndarray, config: ClipConfig) -> np.ndarray:
    """uint8 (h, w, 3) → (config.size, config.channels), antialiased bilinear, in one pass with the crop."""
    height, width, _ = frame.shape
    rows, columns = config.size
    fits = (height, width) == (rows, columns)
    if fits and config.channels == 3:
        return frame
    image = Image.fromarray(frame)
    if not fits:
        box_height, box_width = float(height), float(width)
        if config.resize == "crop":
            scale = min(height / rows, width / columns)
            box_height, box_width = rows * scale, columns * scale
        top, left = (height - box_height) / 2, (width - box_width) / 2
        box = (left, top, left + box_width, top + box_height)
        image = image.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    if config.channels == 1:
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image)


def _one_line(error: Exception) -> str:
    """The first line that says something: decord appends a C++ stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
