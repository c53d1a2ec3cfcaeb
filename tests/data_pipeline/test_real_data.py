"""Real videos: real codecs, real damage. Needs STPREDICT_TEST_DATA."""

import io
from contextlib import closing

import av
import numpy as np
import pytest

from data_pipeline.config import ClipConfig, ClipDataConfig, FolderSource, MovingDigitsSource
from data_pipeline.decode import DecodeError, decode_clip, probe
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.order import Share
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.moving_digits import digit_images
from data_pipeline.sources.source import describe, walk
from data_pipeline.stream import clip_batches

ACTIONS = ["bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2"]


def test_weizmann_from_folder_to_batches(test_data, tmp_path):
    source = FolderSource(path=test_data / "weizmann")
    samples = walk(source)
    assert len(samples) == 90
    assert sorted({sample.label for sample in samples}) == ACTIONS
    train = [sample for sample in samples if sample.split == "train"]
    plans = plan_shards(source, train, describe(source, samples), shards=12, window_bytes=2**20, seed=0)
    write_shards(tmp_path / "train", plans)
    merge(tmp_path / "train")
    assert read_manifest(tmp_path / "train").samples == len(train)
    config = ClipDataConfig(shards=tmp_path, clip=ClipConfig(size=(48, 64)), workers=1)
    with closing(clip_batches(config, "train", seed=0, share=Share(0, 1, 8))) as batches:
        for item in batches.draw(0, 3):
            assert item["clip"].shape == (8, 17, 48, 64, 3)
            assert all(key.startswith(ACTIONS[label]) for key, label in zip(item["key"], item["label"], strict=True))
            assert item["clip"].float().std() > 10


def test_frames_of_real_codecs_equal_an_independent_decoders(test_data):
    for name in ("weizmann/walk/denis_walk.avi", "awkward/codecs/h265_video.mp4", "awkward/odd/realshort.mp4"):
        encoded = (test_data / name).read_bytes()
        info = probe(encoded)
        with av.open(io.BytesIO(encoded)) as container:
            expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert info.frames == len(expected), name
        config = ClipConfig(frames=4, stride=2, start="centre", size=(info.height, info.width))
        clip = decode_clip(encoded, config, np.random.default_rng(0))
        first = (len(expected) - 7) // 2
        difference = np.abs(clip.astype(int) - np.stack(expected[first : first + 7 : 2]))
        assert difference.mean() < 2, name


@pytest.mark.parametrize(
    "name", ["corrupt/broken.mp4", "corrupt/html_page_named.avi", "odd/audio_only.mp4", "odd/invalid_userdata.mp4"]
)
def test_broken_files_are_decode_errors(test_data, name):
    with pytest.raises(DecodeError, match="pyav: "):
        probe(test_data / "awkward" / name)


def test_av1_and_a_cut_file_are_read_by_pyav(test_data):
    for name, frames in (("fate/av1_av1-1-b10-23-film_grain-50.mp4", 10), ("corrupt/truncated_xvid.avi", 194)):
        info = probe(test_data / "awkward" / name)
        assert (info.decoder, info.frames) == ("pyav", frames)
        encoded = (test_data / "awkward" / name).read_bytes()
        assert decode_clip(encoded, ClipConfig(frames=5), np.random.default_rng(0), info).shape == (5, 64, 64, 3)


def test_what_was_filmed_upright_is_read_upright(test_data):
    for name in ("ios9.mov", "sideways_movie.mov", "video_270.mov"):
        info = probe(test_data / "awkward" / "rotated" / name)
        assert info.height > info.width, name


def test_mnist_digits(test_data):
    config = MovingDigitsSource(mnist=test_data / "mnist" / "raw")
    images, names = digit_images(config, "val")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(names).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
