"""Encoded video bytes → uint8 clip. Torch-free.

``probe`` looks at a video once, when its shard is written. It decodes all of it with PyAV, which says what the frames
are (``decoders``), and looks whether decord gives the same ones: their number, their times, their size as displayed
(rotation), and their pixels, after seeks to keyframes all over the video. decord is known to be wrong on edit lists,
negative first timestamps, overlapping fragments, several video streams, rotation outside mp4, sizes that change, 8x8
videos, and after seeks in open groups of pictures and interlaced H.264; it is caught by comparing, not by such a list.
(One fault comes and goes, and is avoided by rule: ``DecordReader.reliable``.)

``decode_clip`` then goes by what was recorded: decord where it was right, as it seeks to the frames wanted, else PyAV.
If decord fails all the same, PyAV is asked. A frame that cannot be decoded is an error, never a grey, repeated or
concealed one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_pipeline.clips import CLOCK_SLACK, Part, Plan, clip_indices, fit_frame, shown_frames
from data_pipeline.config import MAX_PIXELS, ClipConfig
from data_pipeline.decoders import Decoder, DecordReader, PillowReader, PyAVReader, check_size, is_image, one_line
from data_pipeline.errors import DecodeError

VIDEO_EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS

SEEKS = 16  # groups of pictures in which decord is compared with PyAV
TOLERANCE = 0.5  # mean difference of levels in a frame: the same frame of an 8-bit video gives 0.0
_PACKAGES: dict[Decoder, str] = {"decord": "decord", "pyav": "av", "pillow": "pillow"}


@dataclass(frozen=True)
class VideoInfo:
    """What there is in a video: ``frames`` that can be had, size in pixels as displayed (of the first frame).

    An image has one frame and ``fps`` 0. ``decoder`` gives these frames; it did in ``decoder_version``.
    """

    frames: int
    fps: float
    height: int
    width: int
    decoder: Decoder
    decoder_version: str


def decode_clip(
    encoded: bytes,
    config: ClipConfig,
    rng: np.random.Generator,
    info: VideoInfo | None = None,
    part: Part = (0, 1),
) -> np.ndarray:
    """One clip of a video or image: uint8 (t, h, w, c), RGB or luminance.

    ``rng`` gives the same number of draws whatever happens. ``part`` (i, n) asks for the i-th of n clips.
    ``info`` is what ``probe`` says of these bytes; without it the video is probed first, which takes much longer.
    DecodeError if the video is too short or too large, or, naming the reason per decoder, no decoder gives all frames.
    """
    plan = Plan.draw(rng, config)
    info = info or probe(encoded, config.max_pixels)
    check_size(info.height, info.width, config.max_pixels)
    indices = None if config.fps else clip_indices(info.frames, config, plan.start, part)
    failures = []
    for decoder in ("decord", "pyav") if info.decoder == "decord" else (info.decoder,):
        try:
            video = _reader(decoder, encoded, info, config.max_pixels)
            if config.fps:
                shown = shown_frames(video.times(info.fps), info.fps, config.fps)
                indices = shown[clip_indices(len(shown), config, plan.start, part)]
            wanted, place = np.unique(indices, return_inverse=True)
            frames = [fit_frame(frame, config, plan) for frame in video.read(wanted.tolist())]
            return plan.mirrored(np.stack([frames[number] for number in place]), config)
        except Exception as error:  # decoders raise what they like on broken input
            failures.append(f"{decoder}: {one_line(error)}")
    raise DecodeError("; ".join(failures))


def probe(video: bytes | str | Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What there is to know of a video or image, which is decoded as a whole.

    DecodeError if nothing of it can be decoded, or a frame anywhere in it claims more than ``max_pixels``: that is
    refused before such a frame is allocated.
    """
    encoded = video if isinstance(video, bytes) else Path(video).read_bytes()
    decoder = "pillow" if is_image(encoded) else "pyav"
    try:
        if decoder == "pillow":
            (image,) = PillowReader(encoded, max_pixels).read([0])
            height, width, _ = image.shape
            return VideoInfo(1, 0.0, height, width, "pillow", version("pillow"))
        opened = PyAVReader(encoded, max_pixels)
        if not opened.frames:
            raise DecodeError(f"no frame can be decoded {opened.damage}".rstrip())
        if decord_agrees(encoded, opened):
            decoder = "decord"
    except Exception as error:
        raise DecodeError(f"{decoder}: {one_line(error)}") from error
    height, width = next(iter(opened.sizes))
    return VideoInfo(opened.frames, opened.fps, height, width, decoder, version(_PACKAGES[decoder]))


def decord_agrees(encoded: bytes, truth: PyAVReader) -> bool:
    """Whether decord gives the frames that ``truth`` counted: compared by number, time, size and pixels."""
    if truth.damage or len(truth.sizes) > 1:  # decord looks for neither
        return False
    try:
        video = DecordReader(encoded)
        if video.frames != truth.frames:
            return False
        if video.reliable < video.frames and truth.codec != "mpeg4":  # MPEG-4 part 2 holds back one frame at most
            return False
        if truth.fps and np.abs(video.times(truth.fps) - truth.times(truth.fps)).max() > 2 * CLOCK_SLACK:
            return False
        wanted = _seek_targets(video.keyframes, video.reliable)
        # Backwards, so that it has to seek for each of them.
        found = {index: _thinned(frame) for index in reversed(wanted) for frame in video.read([index])}
    except Exception:  # decord raises what it likes
        return False
    for index, frame in zip(wanted, truth.read(wanted), strict=True):
        (size, pixels), (expected_size, expected) = found[index], _thinned(frame)
        if size != expected_size or np.abs(pixels - expected).mean() > TOLERANCE:
            return False
    return True


def _seek_targets(keyframes: Sequence[int], frames: int) -> list[int]:
    """The first and the last frame of groups of pictures, evenly spread, those of the video's ends among them."""
    starts = sorted({0, *keyframes})
    groups = list(zip(starts, [*starts[1:], frames], strict=True))
    chosen = np.unique(np.linspace(0, len(groups) - 1, SEEKS).astype(int))
    return sorted({index for group in chosen for index in (groups[group][0], groups[group][1] - 1)})


def _thinned(frame: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The frame's shape and at most 128 x 128 of its pixels, as they are: to keep for comparing."""
    height, width, _ = frame.shape
    return frame.shape, frame[:: -(-height // 128), :: -(-width // 128)].astype(np.int16)


def _reader(
    decoder: Decoder, encoded: bytes, info: VideoInfo, max_pixels: int
) -> DecordReader | PyAVReader | PillowReader:
    match decoder:
        case "decord":
            return DecordReader(encoded)
        case "pyav":
            return PyAVReader(encoded, max_pixels, info.frames)
        case "pillow":
            return PillowReader(encoded, max_pixels)
