"""Real videos: real codecs, real damage. Needs STPREDICT_TEST_DATA."""

import io
from contextlib import closing

import av
import numpy as np
import pytest

from data_pipeline.config import ClipConfig, ClipDataConfig, FolderSource, MovingDigitsSource
from data_pipeline.decode import decode_clip, probe
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


# Frames and rate as ffprobe 5.1 counts and states them.
REAL = {
    "ucf101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": (164, 25),
    "ucf101/BabyCrawling/video3.avi": (185, 25),
    "ucf101/Diving/v_Diving_g01_c03.avi": (214, 30000 / 1001),
    "kth/boxing/person01_boxing_d1_uncomp.avi": (360, 25),
    "kinetics/R6llTwEh07w.mp4": (303, 30),
    "kinetics/WUzgd7C1pWA.mp4": (327, 30000 / 1001),
    "kinetics/flipping_a_pancake.mkv": (310, 30),
    "kinetics/mmaction_part_0.mp4": (32, 30),
    "weizmann/walk/denis_walk.avi": (68, 25),
}


@pytest.mark.parametrize("name", REAL)
def test_frames_rate_times_and_pixels_of_the_data_sets_are_right(test_data, name):
    """At 8 frames a second, by stride and at random, against a bare PyAV loop; AVI's times are those of its rate."""
    encoded = (test_data / name).read_bytes()
    info = probe(encoded)
    assert (info.frames, info.fps, info.decoder) == (*REAL[name], "decord")
    with av.open(io.BytesIO(encoded)) as container:
        frames = list(container.decode(video=0))
    times = [float(frame.pts * frame.time_base) for frame in frames]
    if name.endswith("avi"):
        times = [number / info.fps for number in range(info.frames)]
    shown = [max(n for n, at in enumerate(times) if at - times[0] <= k / 8 + 0.001) for k in range(8)]

    size = (info.height, info.width)
    start = int(np.random.default_rng(5).random() * (info.frames - 16))  # the first number drawn places the clip
    for config, wanted in (
        (ClipConfig(frames=8, fps=8, size=size, start="first"), shown),
        (ClipConfig(frames=5, stride=7, size=size, start="first"), range(0, 35, 7)),
        (ClipConfig(frames=17, size=size), range(start, start + 17)),
    ):
        if info.frames > max(wanted):
            clip = decode_clip(encoded, config, np.random.default_rng(5), info)
            expected = np.stack([frames[number].to_ndarray(format="rgb24") for number in wanted])
            assert np.abs(clip.astype(int) - expected).mean(axis=(1, 2, 3)).max() < 0.5


def test_mnist_digits(test_data):
    config = MovingDigitsSource(mnist=test_data / "mnist" / "raw")
    images, names = digit_images(config, "val")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(names).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
