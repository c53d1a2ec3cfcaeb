"""Arrays with a row for each clip, which several processes write."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from stpredict.jobs.clip_arrays import ClipArray

RNG = np.random.default_rng(0)


def test_rows_stand_where_numpy_reads_them_whatever_a_write_takes_at_once(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:7], offset))
    for dtype in (np.uint8, np.uint16, np.float32):
        values = (100 * RNG.random((5, 3, 4))).astype(dtype)
        array = ClipArray(tmp_path / "a.npy", 5, (3, 4), np.dtype(dtype))
        array.create()
        array.write([1, 4], values[[1, 4]])
        array.write([0, 2], values[[0, 2]].astype(np.float64))
        found = np.load(array.path)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.where(np.arange(5)[:, None, None] == 3, 0, values))
        assert array.bytes == values.nbytes


def test_a_file_of_an_earlier_run_is_begun_anew(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((9, 2)))
    array = ClipArray(tmp_path / "a.npy", 2, (2,), np.dtype(np.float32))
    array.create()
    np.testing.assert_array_equal(np.load(array.path), np.zeros((2, 2)))


def test_a_full_disk_is_an_error_that_names_the_file():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        ClipArray(full, 2, (2,), np.dtype(np.float32)).write([1], np.ones((1, 2)))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
