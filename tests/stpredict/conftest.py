from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stpredict.jobs import encode
from stpredict.jobs.config import EncodeConfig
from stpredict.run import Run
from stpredict.training.ranks import Ranks
from tests.stpredict.forecasters.fields import make_field_shards, make_video_shards
from tests.stpredict.tokenized import make_shards, make_tokenizer


class OneOf(Ranks):
    """A rank that meets no others."""

    def barrier(self) -> None:
        pass


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "export")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tokenized"))


@pytest.fixture(scope="session")
def field_shards(tmp_path_factory) -> Path:
    return make_field_shards(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="session")
def video_shards(tmp_path_factory) -> Path:
    return make_video_shards(tmp_path_factory.mktemp("video"))


@pytest.fixture
def encoded(tokenizer, shards, tmp_path, monkeypatch):
    """``encoded(name, …)`` is the run of an encode job, done as ``rank`` of ``world_size`` in this process."""

    def encoded(name: str, rank: int = 0, world_size: int = 1, **config) -> Path:
        @contextmanager
        def join_ranks():
            yield OneOf(rank, world_size, torch.device("cpu"), None)

        monkeypatch.setattr(encode, "join_ranks", join_ranks)
        data = {"shards": shards, "workers": 0, **config.pop("data", {})}
        config = {"tokenizer": tokenizer, "shards": 6, **config}
        run = Run(tmp_path / name)
        run.update_status(kind="encode")
        encode.run(EncodeConfig(run=run.path, data=data, **config), run)
        return run.path

    return encoded
