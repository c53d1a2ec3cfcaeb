"""What generate says of its speed, measured on a prior that knows nothing."""

import json
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from stpredict.config import as_yaml
from stpredict.evaluation.generated import read_index
from stpredict.exports import PriorExport, load_tokenizer
from stpredict.jobs import generate
from stpredict.jobs.config import GenerateConfig
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.run import Run
from stpredict.training.ranks import Ranks
from tests.stpredict.tokenized import GRID, VAL

DELAY_S, FIRST_S = 0.05, 1.5  # that a forward of the prior takes longer, and the first of all


class OneOf(Ranks):
    """A rank that meets no others."""

    def barrier(self) -> None:
        pass


@pytest.fixture
def generated(tokenizer, shards, tmp_path, monkeypatch) -> Run:
    _, export, fingerprint = load_tokenizer(tokenizer)
    model = NextBlockConfig(layers=1, width=32, heads=1, mlp_width=48, block=(1, 2, 4))
    codes = export.model.codebook_size
    prior = PriorExport(codebook_size=codes, grid=GRID, tokenizer_fingerprint=fingerprint, model=model)
    (tmp_path / "prior").mkdir()
    save_file(NextBlockPrior(model, codes, GRID).state_dict(), tmp_path / "prior" / "model.safetensors")
    (tmp_path / "prior" / "config.yaml").write_text(as_yaml(prior))

    @contextmanager
    def join_ranks():
        yield OneOf(0, 1, torch.device("cpu"), None)

    forward, calls = NextBlockPrior.forward, []

    def slow(self, *args, **kwargs):
        time.sleep(DELAY_S if calls else FIRST_S)
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(generate, "join_ranks", join_ranks)
    monkeypatch.setattr(NextBlockPrior, "forward", slow)
    run = Run(tmp_path / "generated")
    run.update_status(kind="generate")
    data = {"shards": shards, "workers": 0}
    config = GenerateConfig(
        run=run.path, prior=tmp_path / "prior", tokenizer=tokenizer, data=data, given_frames=3, batch_size=2, pictures=0
    )
    generate.run(config, run)
    return run


def test_speed_is_that_of_sampling_all_clips_without_the_warm_up(generated):
    speed = read_index(generated).speed
    assert (speed.clips, speed.batches, speed.batch_size, speed.device) == (VAL, 2, 2, "CPU")
    assert speed.predicted_frames == VAL * 2  # of clips of five
    assert speed.forward_steps == 2  # of the three latent frames two are given; a frame has two blocks
    slept = 2 * 2 * DELAY_S
    assert slept <= speed.sampling_s < slept + FIRST_S
    assert speed.sampling_s < speed.whole_s
    assert speed.frames_per_s == pytest.approx(6 / speed.sampling_s)


def test_an_index_of_earlier_has_no_speed_and_is_read(generated):
    path = generated.samples / "index.json"
    written = json.loads(path.read_text())
    del written["speed"]
    path.write_text(json.dumps(written))
    assert read_index(generated).speed is None
