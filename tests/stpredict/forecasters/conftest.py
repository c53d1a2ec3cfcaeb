from pathlib import Path

import pytest

from tests.stpredict.forecasters.fields import make_field_shards, make_video_shards


@pytest.fixture(scope="session")
def field_shards(tmp_path_factory) -> Path:
    return make_field_shards(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="session")
def video_shards(tmp_path_factory) -> Path:
    return make_video_shards(tmp_path_factory.mktemp("video"))
