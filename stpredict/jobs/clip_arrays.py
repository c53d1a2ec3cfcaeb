"""Arrays with a row for each clip, in a run's samples/, which all ranks of a job fill."""

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from data_pipeline.disk import renamed
from data_pipeline.errors import UsageError

log = logging.getLogger(__name__)
CHUNK_BYTES = 2**24  # of rows that are in memory at once where some are left out


@dataclass(frozen=True)
class ClipArray:
    """``count`` rows of ``shape`` and ``dtype`` in the .npy file ``path``.

    Rows are written, not mapped: of a map, a page on a network file system that holds rows of two ranks can end with
    one's alone, and a full disk ends the process without a line. Here it is an OSError that names the file.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.count * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def _header(self) -> bytes:
        header = io.BytesIO()
        shape = (self.count, *self.shape)
        about = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(header, about)
        return header.getvalue()

    def create(self) -> None:
        """Makes the file, all zeros and of its full size: one rank does, before any writes."""
        with self.path.open("wb") as file:
            file.truncate(len(self._header) + self.bytes)
            file.write(self._header)

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """``values`` (n, *shape) to the n ``rows``. Other processes may write other rows meanwhile."""
        values = np.ascontiguousarray(values, self.dtype)
        assert values.shape == (len(rows), *self.shape), f"{values.shape} for {len(rows)} rows of {self.shape}"
        start = len(self._header)
        # For writing alone: what a network file system has read of a page it may write back, others' old rows included.
        file = os.open(self.path, os.O_WRONLY)
        try:
            for row, value in zip(rows, values, strict=True):
                _write(file, value.tobytes(), start + row * self._row_bytes)
        except OSError as error:
            error.filename = str(self.path)  # a write that failed does not know its file
            raise
        finally:
            os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    """All of ``data``: one call may write less."""
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def keep_read(folder: Path, arrays: dict[str, np.ndarray], rows: Sequence[int]) -> None:
    """Leaves the ``rows`` that were read in ``arrays``, memory-mapped, and in their files, NAME.npy in ``folder``.
    UsageError where there are none."""
    if not rows:
        raise UsageError(f"{folder.parent}: not one held-out clip could be read; look at the log for their names")
    wanted = len(next(iter(arrays.values())))
    if len(rows) == wanted:
        return
    log.warning("%d of %d clips could not be read and are left out", wanted - len(rows), wanted)
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        step = max(1, CHUNK_BYTES // array[0].nbytes)
        with renamed(path) as temporary:
            kept = ClipArray(temporary, len(rows), array.shape[1:], array.dtype)
            kept.create()
            for start in range(0, len(rows), step):
                chunk = list(rows[start : start + step])
                kept.write(range(start, start + len(chunk)), array[chunk])
        arrays[name] = np.load(path, mmap_mode="r")
