"""KEY.npy of a shard → clip: arrays (t, h, w, c), frames as uint8 or a physical field as float32. Torch-free.

Frames are cut like those of encoded videos. A field is cut in time, cropped and mirrored, never interpolated: values
between the measured ones, of the extremes most of all, would be inventions.
"""

import io
import math
from typing import IO

import numpy as np
from numpy.lib import format as npy

from data_pipeline.clips import Part, Plan, clip_indices, cut_box, fit_frame
from data_pipeline.config import ClipConfig
from data_pipeline.decoders import check_size, one_line
from data_pipeline.errors import DecodeError, UsageError

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def load_array(encoded: bytes) -> np.ndarray:
    """The array (t, h, w, c), uint8 or float32, of a .npy file. DecodeError if it is anything else, and like
    ``read_npy``."""
    values = read_npy(encoded)
    if values.dtype not in (np.uint8, np.float32):
        raise DecodeError(f"npy: holds {values.dtype}; uint8 and float32 are read")
    if values.ndim != 4 or min(values.shape) < 1:
        raise DecodeError(f"npy: has the shape {values.shape}; (t, h, w, c) is needed")
    return values


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file that holds ``array``, as a member of a shard."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def read_npy(encoded: bytes) -> np.ndarray:
    """The numbers in a .npy file: a view of ``encoded``, not to be written to.

    DecodeError if it is no .npy, asks to unpickle, or has not the bytes that its header claims.
    """
    file = io.BytesIO(encoded)
    shape, fortran_order, dtype = read_npy_header(file)
    if dtype.hasobject:
        raise DecodeError("npy: holds pickled objects, which could run code; store numbers")
    claimed, held = math.prod(shape) * dtype.itemsize, len(encoded) - file.tell()
    if claimed != held or not dtype.itemsize or min(shape, default=0) < 0:
        raise DecodeError(f"npy: {held} bytes, {claimed} claimed by shape {shape}")
    values = np.frombuffer(encoded, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type; ``file`` then stands at the data. DecodeError if it is no .npy."""
    try:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise DecodeError(f"npy: version {version} is not read")
        return _HEADERS[version](file)
    except DecodeError:
        raise
    except Exception as error:  # numpy raises what it likes on a damaged header: tokenize's errors, SyntaxError, …
        raise DecodeError(f"npy: {one_line(error)}") from None


def cut_array(array: np.ndarray, config: ClipConfig, rng: np.random.Generator, part: Part = (0, 1)) -> np.ndarray:
    """One clip of an array (t, h, w, c): uint8 (t, *size, channels), or float32 (t, *size, c) with all its channels.

    Draws from ``rng`` and ``part`` are as for ``decode_clip``. DecodeError if the array is too short or too large, or
    a field would have to be resized; UsageError if the config wants frames by their time, of which arrays know nothing.
    """
    plan = Plan.draw(rng, config)
    if config.fps:
        raise UsageError("clip.fps: arrays carry no times; use clip.stride")
    frames, height, width, channels = array.shape
    check_size(height, width, config.max_pixels)
    indices = clip_indices(frames, config, plan.start, part)
    chosen = array[indices.start : indices.stop : indices.step]
    if array.dtype == np.float32:
        clip = np.array(_crop_field(chosen, config, plan))
    elif channels in (1, 3):
        clip = np.stack([fit_frame(frame, config, plan) for frame in chosen])
    else:
        raise DecodeError(f"{channels} channels of uint8; 1 (luminance) and 3 (RGB) are frames")
    return plan.mirrored(clip, config)


def _crop_field(field: np.ndarray, config: ClipConfig, plan: Plan) -> np.ndarray:
    _, height, width, _ = field.shape
    rows, columns = config.size
    left, top, right, bottom = cut_box(height, width, config, plan)
    if not (math.isclose(right - left, columns) and math.isclose(bottom - top, rows)):
        raise DecodeError(
            f"a field of {height}x{width} (height x width) is not resized to {rows}x{columns}: "
            f"set clip.size (of a forecaster, model.size) to that, or crop with clip.short_side {min(height, width)}"
        )
    top, left = round(top), round(left)
    return field[:, top : top + rows, left : left + columns]


def centre_rows(height: int, config: ClipConfig) -> slice:
    """Which of a field's rows a clip has, cut from the centre: those of ``cut_array``."""
    rows, columns = config.size
    unresized = config.short_side or columns  # a field's width, as far as it matters to the rows
    _, top, _, _ = cut_box(height, unresized, config, Plan(start=0, top=0.5, left=0.5, mirror=0))
    return slice(round(top), round(top) + rows)
