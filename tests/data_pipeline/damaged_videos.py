"""Small videos that lie about their size or are damaged, made for tests."""

import io
import re
from fractions import Fraction

import av
import numpy as np


def encode(
    frames: np.ndarray,
    format: str,
    codec: str,
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """``frames``, uint8 (t, h, w, 3); ``times`` in milliseconds, by default 100 apart."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pix_fmt
        stream.codec_context.thread_count = 1  # the same bytes every time
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = times[number] if times else 100 * number, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def claim_size(encoded: bytes, side: int, first: int) -> bytes:
    """The JPEG or VP8 frames from number ``first`` on claim to be of ``side`` x ``side`` pixels."""
    jpeg = rb"\xff\xc0\x00\x11\x08"  # start of frame
    marker, order = (jpeg, "big") if re.search(jpeg, encoded) else (rb"\x9d\x01\x2a", "little")
    changed = bytearray(encoded)
    for match in list(re.finditer(marker, encoded))[first:]:
        changed[match.end() : match.end() + 4] = side.to_bytes(2, order) * 2
    return bytes(changed)
