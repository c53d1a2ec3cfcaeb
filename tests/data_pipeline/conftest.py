from pathlib import Path

import pytest
from numbered_videos import make_shards, make_videos


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """43 videos of 12 numbered frames in 3 classes."""
    return make_videos(tmp_path_factory.mktemp("videos"), 43)


@pytest.fixture(scope="session")
def clip_set(videos, tmp_path_factory) -> Path:
    """The 43 videos in train/: 8 shards, with two or three windows each."""
    return make_shards(videos, tmp_path_factory.mktemp("clips"), shards=8, window_bytes=10_000)
