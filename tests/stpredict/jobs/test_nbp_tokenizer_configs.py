"""The published tokenizers' configs say what the paper's appendix says, and build."""

from pathlib import Path

import pytest

from launcher.jobs import load_job
from stpredict.estimates.planned import plan_training

FOLDER = Path("configs/tokenizers")
#: Clips of an epoch, epochs, peak learning rate.
PUBLISHED = {"ucf101": (9_537, 2_000, 5e-5), "k600": (392_622, 100, 1e-4)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyper_parameters(name):
    config = load_job(FOLDER / f"nbp_{name}.yaml", ["data.shards=s"], "train")
    task = plan_training(config).task
    clips, epochs, lr = PUBLISHED[name]
    training = config.training
    assert sum(p.numel() for p in task.model.parameters()) == 370_372_105
    assert task.tokens({"clip": plan_training(config).batch(1)["clip"]}) == 1280
    assert config.model.codebook_size == 64_000
    assert task.weights == {"l1": 1, "perceptual": 0.1}
    assert task.adversarial_weights == {"adversarial": 0.1}
    assert (config.data.clip.fps, training.batch_size) == (8, 256)
    assert training.steps == pytest.approx(clips * epochs / 256, abs=1)
    assert (training.optimizer.kind, training.optimizer.lr) == ("adam", lr)
    assert (training.schedule.kind, training.schedule.warmup_ratio) == ("linear", 0.01)
    assert "lpips" in task.metrics


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_differs_in_size_alone(name):
    full, tiny = (load_job(FOLDER / f"nbp_{name}{of}.yaml", ["data.shards=s"], "train") for of in ("", "_tiny"))
    assert tiny.loss.model_dump(include={"l1", "l2"}) == full.loss.model_dump(include={"l1", "l2"})
    assert tiny.loss.perceptual.weight == full.loss.perceptual.weight
    assert (tiny.loss.adversarial.loss, tiny.loss.adversarial.weight) == ("hinge", full.loss.adversarial.weight)
    assert (tiny.model.strides, tiny.model.levels) == (full.model.strides, full.model.levels)
    assert tiny.training.schedule == full.training.schedule
