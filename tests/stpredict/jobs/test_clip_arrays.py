"""Arrays with a row for each clip, which several processes write."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from stpredict.jobs import clip_arrays
from stpredict.jobs.clip_arrays import ClipArray, keep_read

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


@pytest.fixture
def stored(tmp_path):
    """Two arrays of nine rows in ``samples/``, memory-mapped, and what they hold."""
    values = {"a": RNG.random((9, 3, 2), np.float32), "b": RNG.integers(0, 9, (9, 5), np.uint8)}
    (tmp_path / "samples").mkdir()
    for name, array in values.items():
        np.save(tmp_path / "samples" / f"{name}.npy", array)
    return {name: np.load(tmp_path / "samples" / f"{name}.npy", mmap_mode="r") for name in values}, values


def test_rows_that_were_read_are_kept_a_few_in_memory_at_a_time(tmp_path, stored, monkeypatch):
    arrays, values = stored
    folder, rows, sizes, write = tmp_path / "samples", [0, 2, 3, 4, 6, 7, 8], [], ClipArray.write
    monkeypatch.setattr(clip_arrays, "CHUNK_BYTES", 60)
    monkeypatch.setattr(
        ClipArray, "write", lambda self, rows, chunk: sizes.append(chunk.nbytes) or write(self, rows, chunk)
    )
    keep_read(folder, arrays, rows)
    assert sizes == [48, 48, 48, 24, 35]
    for name, of_all in values.items():
        np.testing.assert_array_equal(arrays[name], of_all[rows])
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), of_all[rows])
        assert isinstance(arrays[name], np.memmap)
    assert sorted(path.name for path in folder.iterdir()) == ["a.npy", "b.npy"]


def test_a_disk_that_is_full_meanwhile_leaves_the_file_as_it_was(tmp_path, stored, monkeypatch):
    arrays, values = stored

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        keep_read(tmp_path / "samples", arrays, [0, 1])
    np.testing.assert_array_equal(np.load(tmp_path / "samples" / "a.npy"), values["a"])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["a.npy", "b.npy"]


def test_no_clip_at_all_is_a_line(tmp_path, stored):
    with pytest.raises(UsageError, match=f"{tmp_path}: not one held-out clip could be read; look at the log"):
        keep_read(tmp_path / "samples", stored[0], [])
