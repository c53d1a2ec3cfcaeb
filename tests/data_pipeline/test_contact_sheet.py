import shutil
from dataclasses import asdict

import numpy as np
import pytest
from numbered_videos import make_shards
from PIL import Image, ImageDraw

from data_pipeline.config import ArraysSource
from data_pipeline.contact_sheet import CAPTION, TILE, contact_sheet
from data_pipeline.decode import probe
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description, merge, read_manifest
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.source import describe, walk
from data_pipeline.tar_shard import TarShard


def tiles(sheet, row, columns):
    pixels = np.asarray(sheet, float)[row * (TILE + CAPTION) + CAPTION :][:TILE]
    return [pixels[:, column * TILE : (column + 1) * TILE].mean() for column in range(columns)]


def test_rows_are_videos_and_columns_their_frames_in_order(clip_set):
    sheet = contact_sheet(clip_set / "train", columns=4, rows=5)
    assert sheet.size == (4 * TILE, 5 * (TILE + CAPTION))
    for row in range(5):
        np.testing.assert_allclose(tiles(sheet, row, 4), [20 + 6 * frame for frame in (0, 3, 6, 9)], atol=3)


def test_columns_reach_to_the_end_of_the_video(clip_set):
    levels = tiles(contact_sheet(clip_set / "train", columns=3, rows=1), 0, 3)
    np.testing.assert_allclose(levels, [20 + 6 * frame for frame in (0, 5, 10)], atol=3)


def test_more_columns_than_frames_leave_white(clip_set):
    levels = tiles(contact_sheet(clip_set / "train", columns=14, rows=1), 0, 14)
    np.testing.assert_allclose(levels, [20 + 6 * frame for frame in range(12)] + [255, 255], atol=3)


def test_more_rows_than_videos_end_with_the_videos(clip_set):
    assert contact_sheet(clip_set / "train", columns=1, rows=100).size[1] == 43 * (TILE + CAPTION)


def test_of_a_damaged_set_what_can_be_read_is_shown_and_the_rest_is_named(videos, tmp_path, caplog):
    video = next(videos.rglob("*.mp4")).read_bytes()
    about = {**asdict(probe(video)), "class": 0, "label": "a"}
    shards = [
        [("whole", {"mp4": video}, about), ("bare", {"mp4": video}), ("empty", {}, about)],
        [("list", {"mp4": video, "json": b"[1]"}), ("factless", {"mp4": video}, {"class": 0})],
        [("typed", {"mp4": video}, {**about, "frames": "many"})],
        [("cut", {"mp4": video}, about)],
        [("gone", {"mp4": video}, about)],
    ]
    for index, samples in enumerate(shards):
        tar = TarShard(tmp_path, index, window_bytes=2**20)
        for sample in samples:
            tar.add(*sample)
        tar.finish(Description(kind="clips", classes=["a"]), len(shards), "plan")
    merge(tmp_path)
    cut, gone = tmp_path / "shard-000003.tar", tmp_path / "shard-000004.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    gone.unlink()
    assert contact_sheet(tmp_path, columns=1).size[1] == 2 * (TILE + CAPTION)  # whole and factless
    told = [record.message for record in caplog.records]
    assert sorted(told) == [
        f"{cut} cannot be read to its end",
        f"{gone} cannot be read to its end",
        *(f"{tmp_path}: {key} is not shown: a member is missing" for key in ("bare", "cut", "empty")),
        f"{tmp_path}: list is not shown: its .json is damaged: a list, not a mapping",
        f"{tmp_path}: typed is not shown: its .json is not as we write it: frames: Input should be a valid integer, "
        "unable to parse string as an integer",
    ]


def make_array_shards(folder):
    """The two arrays of ``folder``/a.npy."""
    source = ArraysSource(path=folder / "a.npy", axes="n t h w c", train=(0, 2))
    samples = walk(source)
    write_shards(folder, plan_shards(source, samples, describe(source, samples), shards=1, window_bytes=2**20, seed=0))
    merge(folder)


@pytest.mark.parametrize(
    ("dtype", "channels", "expected"),
    [("uint8", 1, [20, 60, 100]), ("uint8", 2, [20, 60, 100]), ("float32", 1, [0, 127, 255])],
)
def test_arrays_are_shown_as_they_are_and_fields_from_their_least_to_their_greatest_value(
    tmp_path, dtype, channels, expected
):
    array = np.zeros((2, 3, 4, 4, channels), dtype)
    array[..., 0] = np.array([20, 60, 100])[:, None, None]
    np.save(tmp_path / "a.npy", array)
    make_array_shards(tmp_path)
    np.testing.assert_allclose(tiles(contact_sheet(tmp_path, columns=4), 1, 4), [*expected, 255], atol=1)


def test_three_channels_of_a_field_are_colours_each_on_its_own_scale(tmp_path):
    array = np.zeros((2, 2, 4, 4, 4), np.float32)
    array[:, 1] = [1e-6, 5, -3e8, 7]
    np.save(tmp_path / "a.npy", array)
    make_array_shards(tmp_path)
    sheet = np.asarray(contact_sheet(tmp_path, columns=2))[CAPTION : CAPTION + TILE]
    assert (sheet[:, :TILE] == (0, 0, 255)).all()
    assert (sheet[:, TILE:] == (255, 255, 0)).all()


@pytest.mark.parametrize("latitudes", [None, [60.0, 50.0, 40.0, 30.0], [30.0, 40.0, 50.0, 60.0]])
def test_named_channels_of_a_field_are_rows_of_their_own_with_north_at_the_top(tmp_path, monkeypatch, latitudes):
    array = np.zeros((1, 2, 4, 4, 2), np.float32)
    array[:, :, 0, :, 0] = 300  # the first row of the first channel
    array[:, 1, :, :, 1] = -2.5
    np.save(tmp_path / "a.npy", array)
    names = {"channels": ("t2m", "u"), "units": ("K", "m/s")}
    source = ArraysSource(path=tmp_path / "a.npy", axes="n t h w c", train=(0, 1), **names)
    samples = walk(source)
    described = describe(source, samples).model_copy(update={"latitudes": latitudes})
    write_shards(tmp_path, plan_shards(source, samples, described, shards=1, window_bytes=2**20, seed=0))
    merge(tmp_path)
    captions = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **style: captions.append(text))
    sheet = np.asarray(contact_sheet(tmp_path, columns=2))
    assert sheet.shape[:2] == (2 * (TILE + CAPTION), 2 * TILE)
    assert [caption.split("  ")[1] for caption in captions] == ["t2m 0 to 300 K", "u -2.5 to 0 m/s"]
    dark, bright = (68, 1, 84), (253, 231, 36)  # the ends of viridis
    first, second = sheet[CAPTION : CAPTION + TILE], sheet[TILE + 2 * CAPTION :]
    top, bottom = (dark, bright) if latitudes and latitudes[0] < latitudes[-1] else (bright, dark)
    assert (first[2, 2] == top).all()
    assert (first[-2, 2] == bottom).all()
    assert (second[1:-1, 1 : TILE - 1] == bright).all()
    assert (second[1:-1, TILE + 1 : -1] == dark).all()
    assert (second[:, [0, TILE - 1, TILE, -1]] == 255).all()


def test_images_are_rows_of_one_tile_and_captions_have_key_and_label(tmp_path, monkeypatch):
    for name in ("cats/a", "dogs/b"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 60), "red").save(tmp_path / f"{name}.png")
    captions = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **style: captions.append(text))
    make_shards(tmp_path, tmp_path / "out", shards=1)
    sheet = np.asarray(contact_sheet(tmp_path / "out" / "train", columns=2))
    assert (sheet[CAPTION : CAPTION + TILE, :TILE] == (255, 0, 0)).all()
    assert (sheet[CAPTION : CAPTION + TILE, TILE:] == 255).all()
    assert sorted((caption.split("-")[0], caption.split()[-1]) for caption in captions) == [
        ("cats_a", "cats"),
        ("dogs_b", "dogs"),
    ]


def test_other_folders_are_refused(clip_set, tmp_path):
    with pytest.raises(UsageError, match="no shard set here"):
        contact_sheet(tmp_path)
    folder = shutil.copytree(clip_set / "train", tmp_path / "latents")
    manifest = read_manifest(folder).model_copy(update={"kind": "latents"})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(UsageError, match="only clips have a picture"):
        contact_sheet(folder)
