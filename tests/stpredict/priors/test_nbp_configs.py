"""The published priors: every config loads and builds on the meta device with its published size, and every pipeline
has what they say. The twins are trained in tests/distributed/test_prior_trainings.py."""

from pathlib import Path

import pytest

from launcher.estimates import load_training
from launcher.pipeline import load_pipeline
from stpredict.estimates.planned import plan_training
from stpredict.estimates.size import size_of
from stpredict.jobs.config import GenerateConfig, PriorJobConfig

ROOT = Path(__file__).parents[3]
PRIORS = sorted(path.stem for path in (ROOT / "configs/priors").glob("nbp_*.yaml"))
LAYERS = {"xl": (24, 1536, 4096), "xxl": (24, 2048, 5504), "3b": (32, 3072, 8192)}
TEXT = "model.conditioning.tokenizer=/models/tokenizer.json"


def load(name: str) -> PriorJobConfig:
    return load_training(ROOT / f"configs/priors/{name}.yaml", [TEXT] if "ucf101" in name else [])


def test_every_size_is_there_for_both_data_sets_with_a_twin():
    assert (
        sorted(f"nbp_{size}_{data}{tiny}" for size in LAYERS for data in ("k600", "ucf101") for tiny in ("", "_tiny"))
        == PRIORS
    )


@pytest.mark.parametrize("name", [name for name in PRIORS if not name.endswith("_tiny")])
def test_the_published_sizes_and_hyper_parameters(name):
    config = load(name)
    _, size, data = name.split("_")
    layers, width, mlp_width = LAYERS[size]
    of_layer = 4 * width**2 + 3 * width * mlp_width + 2 * width
    expected = layers * of_layer + width + 2 * 64_000 * width
    if data == "ucf101":  # 32,000 text ids, the null prefix and the block before the first
        expected += (32_000 + 1 + 16) * width
    assert size_of(plan_training(config)).parameters == expected
    training, optimizer = config.training, config.training.optimizer
    assert (optimizer.kind, optimizer.betas, optimizer.weight_decay) == ("adam", (0.9, 0.98), 0.01)
    rate = {"xl": 1e-3, "xxl": 5e-4, "3b": 2e-4}[size] if data == "k600" else 6e-4
    assert optimizer.lr == rate
    epochs = training.steps * training.batch_size / (392_622 if data == "k600" else 9_537)
    assert epochs == pytest.approx(77 if data == "k600" else 2560, rel=2e-3)
    warmup = {"k600": (64, 10_000), "ucf101": (256, 5_000)}[data]
    assert (training.batch_size, training.schedule.warmup_steps) == warmup
    assert (training.schedule.kind, config.model.block, config.model.dropout) == ("linear", (1, 1, 16), 0.1)


@pytest.mark.parametrize("name", [name for name in PRIORS if name.endswith("_tiny")])
def test_twins_differ_in_size_alone_and_can_be_built(name):
    tiny, full = load(name), load(name.removesuffix("_tiny"))
    assert size_of(plan_training(tiny)).parameters < 10_000_000
    assert type(tiny.model.conditioning) is type(full.model.conditioning)
    assert tiny.training.optimizer.betas == full.training.optimizer.betas


@pytest.mark.parametrize("name", ["nbp_k600", "nbp_k600_tiny", "nbp_ucf101", "nbp_ucf101_tiny", "nbp_weizmann"])
def test_pipelines_are_what_their_configs_say(name):
    given = {"nbp_weizmann": ["vars.videos=/videos"]}.get(name, ["jobs.shards.set.source.path=/videos"])
    if "ucf101" in name:
        given.append("vars.prior.text_tokenizer=/models/tokenizer.json")
    jobs = {job.name: job.config for job in load_pipeline(ROOT / f"configs/pipelines/{name}.yaml", given)[-1]}
    prior, tokenizer = jobs["prior"], jobs["tokenizer"]
    if "weizmann" not in name:
        assert prior.model == load(f"nbp_xl_{name.removeprefix('nbp_')}").model
        assert prior.training.steps == load(f"nbp_xl_{name.removeprefix('nbp_')}").training.steps
        clip = tokenizer.data.clip
        assert tokenizer.model.grid(clip.frames, *clip.size) == prior.latent.grid
    made = next(config for config in jobs.values() if isinstance(config, GenerateConfig))
    assert made.given_frames == prior.given_frames
    assert made.prior == prior.run
