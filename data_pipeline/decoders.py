"""The decoders behind ``decode``: encoded bytes → frames, uint8 (h, w, 3), as displayed. Torch-free.

PyAV says what the frames of a video are: those that FFmpeg reads without an error, without concealment and in the size
limit, from the first keyframe to the first damage. Of what follows a damage nothing is taken: frames refer to
the damaged one, up to a keyframe that may never come, and their number is no longer known. (Damage that still parses,
as some does in VP8 and in H.264's arithmetic code, no decoder can tell from data; once in a shard, its sha256 guards.)

decord gives the same frames faster, where ``decode.probe`` found that it does. Pillow reads images.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.errors import DecodeError

Decoder = Literal["decord", "pyav", "pillow"]

_IMAGES = {"JPEG": rb"\xff\xd8\xff", "PNG": rb"\x89PNG\r\n\x1a\n", "WEBP": rb"RIFF....WEBP"}  # how their files begin


def is_image(encoded: bytes) -> bool:
    """By content; an animation is none."""
    return any(re.match(start, encoded, re.DOTALL) for start in _IMAGES.values())


def check_size(height: int, width: int, max_pixels: int) -> None:
    """DecodeError if a frame has more than ``max_pixels``."""
    if height * width > max_pixels:
        raise DecodeError(f"its frames claim {width}x{height} pixels, over the limit of max_pixels: {max_pixels}")


class PyAVReader:
    """Decodes from the first frame on: the containers that decord refuses seldom seek well.

    ``frames``, where it is known, saves counting. After ``count`` also ``fps``, ``container``, ``codec``, ``sizes``
    (height and width as displayed, in the order of their coming) and ``damage`` (what ended the video early, if
    anything) are known.
    """

    def __init__(self, encoded: bytes, max_pixels: int, frames: int | None = None):
        self._encoded, self._max_pixels = encoded, max_pixels
        self._stamps: np.ndarray | None = None
        self.damage, self.container, self.codec, self.fps = "", "", "", 0.0
        self.sizes: dict[tuple[int, int], None] = {}
        self.frames = self.count() if frames is None else frames

    def count(self) -> int:
        """Decodes the whole video. DecodeError if a frame in it is too large.

        That, and that a demuxer skipped what it could not read, FFmpeg tells in its log alone.
        """
        stamps = []
        with _logged_errors() as messages:
            for frame in self._decode():
                if skipped := [text.strip() for _, part, text in messages if part == self.container]:
                    self.damage = f"damaged data after {len(stamps)} frames: {skipped[0]}"
                    break
                stamps.append(np.nan if frame.pts is None else float(frame.pts * frame.time_base))
                size = (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)
                self.sizes[size] = None
        if self.damage:
            for claimed in filter(None, (re.match(r"Picture size (\d+)x(\d+)", text) for _, _, text in messages)):
                check_size(int(claimed[2]), int(claimed[1]), self._max_pixels)
        self._stamps = np.array(stamps)
        return len(stamps)

    def times(self, fps: float) -> np.ndarray:
        """When each frame is shown (pts x time base), see ``frame_times``. Decodes the whole video."""
        if self._stamps is None:
            self.count()
        return frame_times(self._stamps, fps)

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames numbered ``wanted`` (ascending, each once). DecodeError if one is missing."""
        missing = set(wanted)
        for index, frame in enumerate(self._decode()):
            if index in missing:
                missing.remove(index)
                yield np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
            if not missing:
                return
        raise DecodeError(f"frame {min(missing)} is missing" + (f": {self.damage}" if self.damage else ""))

    def _decode(self) -> Iterator:
        import av

        # Also while the headers are looked at, libavcodec may decode; it shall refuse before it allocates a frame.
        limit = {"max_pixels": str(self._max_pixels)}
        with av.open(io.BytesIO(self._encoded), options=limit) as container:
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not videos:
                raise DecodeError("no video in the file")
            stream, context = videos[0], videos[0].codec_context
            check_size(context.height, context.width, self._max_pixels)
            stream.thread_type, context.thread_count = "NONE", 1
            context.options = limit | {"err_detect": "explode"}  # an error, where else it would conceal the damage
            self.container, self.codec = container.format.name, context.name
            self.fps = float(stream.average_rate or stream.guessed_rate or 0)
            begun, frames = False, 0
            try:
                for packet in container.demux(stream):
                    begun = begun or packet.is_keyframe
                    if not begun and packet.size:
                        continue
                    if packet.is_corrupt:
                        self.damage = f"damaged data after {frames} frames"
                        return
                    for frame in packet.decode():
                        if frame.is_corrupt:
                            self.damage = f"damaged data after {frames} frames"
                            return
                        frames += 1
                        yield frame
            except av.FFmpegError as error:
                self.damage = f"after {frames} frames: {one_line(error)}"


class DecordReader:
    """Seeks to the frames wanted, in one thread. To live for one clip: it decodes ahead of its consumer."""

    def __init__(self, encoded: bytes):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        # A file in memory, not BytesIO: decord prints the name of what it cannot open, and of BytesIO every byte.
        with os.fdopen(os.memfd_create("video"), "wb") as file:
            file.write(encoded)
            file.flush()
            self._video = decord.VideoReader(f"/proc/self/fd/{file.fileno()}", ctx=decord.cpu(0), num_threads=1)
        self.frames = len(self._video)

    @cached_property
    def reliable(self) -> int:
        """How many frames from the first on may be read.

        Where packets do not tell the order of frames (B-frames in AVI), the frame that comes out last, when the codec
        is emptied, is every other time an earlier one. (Codecs that hold back more than one frame spoil more.)
        """
        return self.frames if _ascends(self._stamps) else self.frames - 1

    @cached_property
    def _stamps(self) -> np.ndarray:
        return self._video.get_frame_timestamp(range(self.frames))[:, 0].astype(float)

    @property
    def keyframes(self) -> list[int]:
        """Where it seeks to."""
        return self._video.get_key_indices()

    def times(self, fps: float) -> np.ndarray:
        """When each frame is shown (decord's own index of timestamps), see ``frame_times``."""
        return frame_times(self._stamps, fps)

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames numbered ``wanted``; raises what decord raises, DecodeError for one that is not ``reliable``."""
        for index in wanted:
            if index == self.frames - 1 and index >= self.reliable:
                raise DecodeError(f"may give another frame than {index}, the last")
            yield self._video[index].asnumpy()


class PillowReader:
    """An image as a video of one frame, at time 0."""

    frames = 1

    def __init__(self, encoded: bytes, max_pixels: int):
        self._image = Image.open(io.BytesIO(encoded), formats=tuple(_IMAGES))  # reads the header only
        check_size(self._image.height, self._image.width, max_pixels)
        if self._image.format != "MPO" and getattr(self._image, "is_animated", False):
            raise DecodeError("is an animation; images have one frame")
        if self._image.mode.startswith(("I", "F")):  # Pillow would clip, not scale, these to 8 bits
            raise DecodeError(f"has pixels of mode {self._image.mode}; 8 bits per channel are read")

    def times(self, fps: float) -> np.ndarray:
        return np.zeros(1)

    def read(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The image, upright, for each of ``wanted``; raises what Pillow raises of a damaged one."""
        frame = np.asarray(ImageOps.exif_transpose(self._image).convert("RGB"))
        return (frame for _ in wanted)


def frame_times(stamps: np.ndarray, fps: float) -> np.ndarray:
    """Seconds since the first frame, float64 (frames,), from a container's timestamps, or from ``fps`` without such.

    AVI holds no timestamps; what libraries make up for its packed B-frames runs backwards. So where they do not ascend
    from frame to frame, the rate is what the container says of time. DecodeError if it has no rate either.
    """
    if _ascends(stamps):
        return stamps - stamps[0]
    if not fps:
        raise DecodeError("has neither frame times nor a frame rate, which clip.fps needs")
    return np.arange(len(stamps)) / fps


def _ascends(stamps: np.ndarray) -> bool:
    return bool(np.isfinite(stamps).all() and (np.diff(stamps) > 0).all())


def one_line(error: Exception) -> str:
    """The first line that says something: decord appends a C++ stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _quarter_turns(frame) -> int:
    """Anti-clockwise, from how the frame is stored to how it is shown."""
    return round(frame.rotation / 90)


@contextmanager
def _logged_errors() -> Iterator[list[tuple[int, str, str]]]:
    """What FFmpeg says of its errors: level, part and message of each."""
    import av

    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # or it would hold back what was also said of the last video
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_skip_repeated(skips)
        av.logging.set_level(level)
