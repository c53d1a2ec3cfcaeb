import shutil

import numpy as np
import pytest

from data_pipeline.config import ArraysSource
from data_pipeline.contact_sheet import CAPTION, TILE, contact_sheet
from data_pipeline.errors import UsageError
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.source import describe, walk


def tiles(sheet, row, columns):
    pixels = np.asarray(sheet, float)[row * (TILE + CAPTION) + CAPTION :][:TILE]
    return [pixels[:, column * TILE : (column + 1) * TILE].mean() for column in range(columns)]


def test_rows_are_videos_and_columns_their_frames_in_order(clip_set):
    sheet = contact_sheet(clip_set / "train", columns=4, rows=5)
    assert sheet.size == (4 * TILE, 5 * (TILE + CAPTION))
    for row in range(5):
        np.testing.assert_allclose(tiles(sheet, row, 4), [20 + 6 * frame for frame in (0, 3, 6, 9)], atol=3)


def test_more_columns_than_frames_leave_white(clip_set):
    levels = tiles(contact_sheet(clip_set / "train", columns=14, rows=1), 0, 14)
    np.testing.assert_allclose(levels, [20 + 6 * frame for frame in range(12)] + [255, 255], atol=3)


def test_more_rows_than_videos_end_with_the_videos(clip_set):
    assert contact_sheet(clip_set / "train", columns=1, rows=100).size[1] == 43 * (TILE + CAPTION)


@pytest.mark.parametrize(
    ("dtype", "channels", "expected"),
    [("uint8", 1, [20, 60, 100]), ("uint8", 2, [0, 127, 255]), ("float32", 1, [0, 127, 255])],
)
def test_arrays_are_shown_as_they_are_and_fields_from_their_least_to_their_greatest_value(
    tmp_path, dtype, channels, expected
):
    array = np.zeros((2, 3, 4, 4, channels), dtype)
    array[..., 0] = np.array([20, 60, 100])[:, None, None]
    np.save(tmp_path / "a.npy", array)
    source = ArraysSource(path=tmp_path / "a.npy", axes="n t h w c", train=(0, 2))
    samples = walk(source)
    write_shards(
        tmp_path, plan_shards(source, samples, describe(source, samples), shards=1, window_bytes=2**20, seed=0)
    )
    merge(tmp_path)
    np.testing.assert_allclose(tiles(contact_sheet(tmp_path, columns=4), 1, 4), [*expected, 255], atol=1)


def test_other_folders_are_refused(clip_set, tmp_path):
    with pytest.raises(UsageError, match="no shard set here"):
        contact_sheet(tmp_path)
    folder = shutil.copytree(clip_set / "train", tmp_path / "latents")
    manifest = read_manifest(folder).model_copy(update={"kind": "latents"})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(UsageError, match="only clips have a picture"):
        contact_sheet(folder)
