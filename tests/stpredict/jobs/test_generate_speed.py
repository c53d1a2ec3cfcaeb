"""What generate says of its speed, measured on priors that know nothing."""

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
from stpredict.training.precision import TYPES
from stpredict.training.ranks import Ranks
from tests.stpredict.tokenized import GRID, VAL

DELAY_S, FIRST_S = 0.05, 1.5  # that a forward of the prior takes longer, and the first of all
CLASSES = ["class0", "class1"]


class OneOf(Ranks):
    """A rank that meets no others."""

    def barrier(self) -> None:
        pass


@pytest.fixture
def generated(tokenizer, shards, tmp_path, monkeypatch):
    """``generated(conditioning, …)`` is the run, and the batch and new tokens of every forward of the prior."""
    _, export, fingerprint = load_tokenizer(tokenizer)
    forward, calls, computed_in = NextBlockPrior.forward, [], set()

    @contextmanager
    def join_ranks():
        yield OneOf(0, 1, torch.device("cpu"), None)

    def slow(self, ids, *args, **kwargs):
        time.sleep(DELAY_S if calls else FIRST_S)
        calls.append(tuple(ids.shape))
        logits = forward(self, ids, *args, **kwargs)
        computed_in.add(logits.dtype)
        return logits

    def generated(conditioning: str, given_frames: int, precision: str = "fp32", **sampling) -> tuple[Run, list]:
        model = NextBlockConfig(
            layers=1, width=32, heads=1, mlp_width=48, block=(1, 2, 4), conditioning={"kind": conditioning}
        )
        classes = CLASSES if model.labelled else []
        about = {"codebook_size": export.model.codebook_size, "grid": GRID, "classes": classes}
        prior = PriorExport(tokenizer_fingerprint=fingerprint, model=model, **about)
        (tmp_path / "prior").mkdir()
        weights = NextBlockPrior(model, prior.codebook_size, GRID, len(classes)).state_dict()
        save_file(weights, tmp_path / "prior" / "model.safetensors")
        (tmp_path / "prior" / "config.yaml").write_text(as_yaml(prior))
        monkeypatch.setattr(generate, "join_ranks", join_ranks)
        monkeypatch.setattr(NextBlockPrior, "forward", slow)
        run = Run(tmp_path / "generated")
        run.update_status(kind="generate")
        data = {"data": {"shards": shards, "workers": 0}} if given_frames else {"clips": VAL}
        settings = {"batch_size": 2, "pictures": 0, "sampling": sampling, "given_frames": given_frames, **data}
        where = {"run": run.path, "prior": tmp_path / "prior", "tokenizer": tokenizer}
        generate.run(GenerateConfig(**where, **settings, precision=precision), run)
        assert computed_in == {TYPES[precision]}
        return run, calls

    return generated


@pytest.mark.parametrize(
    ("conditioning", "given_frames", "sampling", "steps"),
    [  # of three latent frames two are given, or none; a frame has two blocks
        ("frames", 3, {}, 2),
        ("class", 3, {"guidance": 2}, 2),
        ("none", 0, {}, 6),
        ("class", 0, {"guidance": 2}, 6),
    ],
)
def test_speed_is_that_of_sampling_all_clips_without_the_warm_up(
    generated, conditioning, given_frames, sampling, steps
):
    run, calls = generated(conditioning, given_frames, **sampling)
    speed = read_index(run).speed
    assert (speed.clips, speed.batches, speed.batch_size, speed.device) == (VAL, 2, 2, "CPU")
    assert speed.predicted_frames == VAL * (5 - given_frames)
    assert speed.forward_steps == steps
    slept = 2 * steps * DELAY_S
    assert slept <= speed.sampling_s < slept + FIRST_S
    assert speed.sampling_s < speed.whole_s
    assert speed.frames_per_s == pytest.approx(speed.predicted_frames / speed.sampling_s)
    assert len(calls) == 2 + 2 * steps
    assert calls[:2] == calls[2:4]  # warmed up with the shapes that follow, of guidance twice as many
    assert calls[0][0] == (4 if sampling else 2)


def test_a_prior_samples_in_bf16_where_it_is_asked_to(generated):
    run, calls = generated("class", 0, precision="bf16", guidance=2)
    assert len(calls) == 2 + 2 * 6
    assert read_index(run).keys


def test_an_index_of_earlier_has_no_speed_and_is_read(generated):
    run, _ = generated("frames", 3)
    path = run.samples / "index.json"
    written = json.loads(path.read_text())
    del written["speed"]
    path.write_text(json.dumps(written))
    assert read_index(run).speed is None
