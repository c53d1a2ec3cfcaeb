import gzip
import io

import av
import numpy as np
import pytest

from data_pipeline.config import MovingDigitsSource
from data_pipeline.decode import probe
from data_pipeline.errors import UsageError
from data_pipeline.shards import plan_shards
from data_pipeline.sources.moving_digits import digit_images, render, trajectories
from data_pipeline.sources.source import describe, read, walk

SMALL = MovingDigitsSource(videos=6, validation_videos=3, frames=9)


def rendered(config):
    return {sample.key: read(config, sample) for sample in walk(config)}


def test_videos_are_real_h264_files_of_the_size_asked_for():
    samples = walk(SMALL)
    assert [s.split for s in samples] == ["train"] * 6 + ["val"] * 3
    extension, data = read(SMALL, samples[0])
    info = probe(data)
    assert (extension, info.frames, info.fps, info.height, info.width) == ("mp4", 9, 10.0, 64, 64)
    assert all(len(s.metadata["digits"]) == 2 and set(s.metadata["digits"]) <= set(range(10)) for s in samples)


def test_a_video_shows_the_digits_that_are_named_where_the_trajectories_say():
    sample = walk(SMALL)[-1]
    digits, names = digit_images(SMALL, "val")
    shown, positions = trajectories(SMALL, "val", sample.item, len(digits))
    assert names[shown].tolist() == sample.metadata["digits"]
    with av.open(io.BytesIO(read(SMALL, sample)[1])) as video:
        frames = np.stack([frame.to_ndarray(format="gray") for frame in video.decode(video=0)])
    np.testing.assert_allclose(frames, render(digits[shown], positions, 64), atol=60)
    assert np.abs(frames.astype(int) - render(digits[shown], positions, 64)).mean() < 4


def test_arrays_are_the_frames_as_rendered_and_mp4_files_stay_what_they_were(tmp_path):
    config = SMALL.model_copy(update={"format": "npy"})
    arrays = {key: np.load(io.BytesIO(data)) for key, (_, data) in rendered(config).items()}
    assert arrays.keys() == rendered(SMALL).keys()
    for sample in walk(config):
        digits, _ = digit_images(config, sample.split)
        shown, positions = trajectories(config, sample.split, sample.item, len(digits))
        array, frames = arrays[sample.key], np.zeros((9, 64, 64), np.uint8)
        for frame, corners in zip(frames, positions, strict=True):
            for digit, (top, left) in zip(digits[shown], corners, strict=True):
                pasted = np.zeros((64, 64), np.uint8)
                pasted[top : top + 28, left : left + 28] = digit
                frame[:] = np.maximum(frame, pasted)
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array[..., 0], frames)
        assert sample.name == f"{sample.split}/{sample.item:06d}.npy"
    assert "format" not in SMALL.model_dump()  # shards of earlier versions are those of the same plan


def test_shards_planned_by_earlier_versions_are_still_the_same_plan():
    samples = walk(SMALL)
    plans = plan_shards(SMALL, samples, describe(SMALL, samples), shards=2, window_bytes=2**20, seed=0)
    assert [plan.hash for plan in plans] == ["e619b8a26ecb2da6", "a3e094c5030437b5"]


def test_a_video_depends_on_seed_split_and_index_alone():
    few, many = rendered(SMALL), rendered(SMALL.model_copy(update={"videos": 9}))
    other = rendered(SMALL.model_copy(update={"seed": 1}))
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many)
    assert not set(few.values()) & set(other.values())


def test_another_recipe_is_another_plan_and_the_same_one_is_not():
    def plan(config):
        samples = walk(config)
        return plan_shards(config, samples, describe(config, samples), shards=1, window_bytes=2**20, seed=0)[0].hash

    assert plan(SMALL) == plan(SMALL.model_copy())
    assert plan(SMALL) != plan(SMALL.model_copy(update={"step_length": 0.2}))


def test_digits_stay_inside_and_move_at_constant_speed_between_bounces():
    config = MovingDigitsSource(frames=200, size=1028, digit_size=28)  # a free range of 1000 pixels
    bounced = 0
    for index in range(20):
        _, positions = trajectories(config, "train", index, 100)
        assert positions.min() >= 0
        assert positions.max() <= 1000
        moves = np.diff(positions, axis=0)
        free = ((positions[:-1] > 0) & (positions[:-1] < 1000) & (positions[1:] > 0) & (positions[1:] < 1000)).all(-1)
        speeds = np.linalg.norm(moves, axis=-1)[free]
        np.testing.assert_allclose(speeds, 100, atol=2)  # a tenth of the free range, up to whole pixels
        bounced += (np.sign(moves[1:]) * np.sign(moves[:-1]) < 0).sum()
    assert bounced > 100


def test_where_digits_overlap_the_brighter_pixel_wins():
    images = np.stack([np.full((8, 8), level, np.uint8) for level in (100, 200, 50)])
    frame = render(images, np.array([[[0, 0], [4, 4], [8, 8]]]), size=32)[0]
    assert frame[[0, 5, 9, 14, 16], [0, 5, 9, 14, 16]].tolist() == [100, 200, 200, 50, 0]


def test_validation_shows_digits_that_training_never_shows():
    train, train_names = digit_images(SMALL, "train")
    val, val_names = digit_images(SMALL, "val")
    assert train.shape[1:] == val.shape[1:] == (28, 28)
    assert set(train_names) == set(val_names) == set(range(10))
    assert not {i.tobytes() for i in train} & {i.tobytes() for i in val}


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files_are_read_plain_or_zipped(tmp_path, zipped):
    images = np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(5, dtype=np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            data = header + array.tobytes()
            name = f"{prefix}-{kind}-ubyte"
            if zipped:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (tmp_path / name).write_bytes(data)
    read, names = digit_images(MovingDigitsSource(mnist=tmp_path), "val")
    np.testing.assert_array_equal(read, images)
    assert names.tolist() == [0, 1, 2, 3, 4]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="no train-images-idx3-ubyte"):
        walk(MovingDigitsSource(mnist=tmp_path))
    with pytest.raises(UsageError, match="digit_size 64 is larger than the video"):
        walk(MovingDigitsSource(digit_size=64, size=32))
