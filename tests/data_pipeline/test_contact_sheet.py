import shutil

import numpy as np
import pytest

from data_pipeline.contact_sheet import CAPTION, TILE, contact_sheet
from data_pipeline.errors import UsageError
from data_pipeline.manifest import read_manifest


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


def test_other_folders_are_refused(clip_set, tmp_path):
    with pytest.raises(UsageError, match="no shard set here"):
        contact_sheet(tmp_path)
    folder = shutil.copytree(clip_set / "train", tmp_path / "latents")
    manifest = read_manifest(folder).model_copy(update={"kind": "latents"})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(UsageError, match="only clips have a picture"):
        contact_sheet(folder)
