import pytest
import torch

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.layers.causal_conv import CausalUpsample, ResidualBlock
from stpredict.losses.config import TokenizerLossConfig
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.tokenizers.task import TokenizerTask

MODEL = CausalCnnConfig(
    patch=8,
    channels=(16, 16),
    blocks=(0, 0),
    strides=((2, 1, 1),),
    middle_blocks=0,
    groups=8,
    video_channels=1,
    levels=(4, 4, 4),
)


def test_a_clip_that_is_not_finite_gives_a_loss_that_is_not_and_counts_no_code(shards):
    """The engine skips such a step; what is told about codes must not end it first."""
    data = ClipDataConfig(shards=shards, clip=ClipConfig(frames=9, size=(32, 32), channels=1))
    torch.manual_seed(0)
    task = TokenizerTask(MODEL, TokenizerLossConfig(l1=0, l2=1), data, seed=0)
    clips = torch.randint(0, 256, (2, 9, 32, 32, 1), dtype=torch.uint8)

    def forward(video):
        video = video.clone()
        video[1] = torch.nan
        return task.model(video)

    sums = task.training_step(forward, {"clip": clips})
    assert sums["l2"].isnan()
    assert sums["codebook"].sum() == 5 * 4 * 4  # of the first clip
    assert torch.equal(sums["codebook"], task.training_step(task.model, {"clip": clips[:1]})["codebook"])


def test_an_adaptive_weight_where_the_last_layer_makes_no_pixels_is_refused():
    job = {
        "run": "run",
        "data": {"shards": "shards"},
        "model": {"patch": 2},
        "loss": {"adversarial": {}},
        "training": {"steps": 1, "batch_size": 1, "discriminator": {"adaptive_weight": True}},
    }
    with pytest.raises(UsageError, match=r"adaptive_weight needs a last layer that makes pixels: with model\.patch 2"):
        validate(TokenizerJobConfig, job, "job.yaml")
    validate(TokenizerJobConfig, {**job, "model": {"patch": 1}}, "job.yaml")


def test_losses_and_metrics_are_means_over_what_they_are_of(shards):
    """Whatever the weight of a clip that only fills up a batch."""
    data = ClipDataConfig(shards=shards, clip=ClipConfig(frames=9, size=(32, 32), channels=1))
    perceptual = {"weight": 0.2, "network": {"kind": "random_features", "channels": [8]}}
    task = TokenizerTask(MODEL, TokenizerLossConfig.model_validate({"l1": 0.5, "perceptual": perceptual}), data, seed=0)
    assert task.weights == {"l1": 0.5, "perceptual": 0.2}
    clips = torch.randint(0, 256, (3, 9, 32, 32, 1), dtype=torch.uint8)
    video = clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    made, ids = task.model(video)
    counts, sums = task.counts({"clip": clips}), task.training_step(task.model, {"clip": clips})
    torch.testing.assert_close(sums["l1"] / counts["l1"], (made - video).abs().mean())
    torch.testing.assert_close(sums["perceptual"] / counts["perceptual"], task.perceptual(made, video).mean())

    batch = {"clip": clips, "weight": torch.tensor([1.0, 1.0, 0.0])}
    found = task.validation_metrics(task.validation_step(task.model, batch))
    assert tuple(found) == task.metrics
    rounded = ((made.clamp(-1, 1) + 1) * 127.5).round()
    mse = ((rounded - clips.permute(0, 4, 1, 2, 3)) / 255)[:2].square().mean((1, 3, 4))
    assert found["psnr"] == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-5)
    assert found["random_features"] == pytest.approx(task.perceptual(rounded / 127.5 - 1, video)[:2].mean().item())
    share = ids[:2].flatten().bincount() / ids[:2].numel()
    entropy = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert found["codebook_entropy_bits"] == pytest.approx(entropy, rel=1e-5)
    same = task.validation_metrics(task.validation_step(lambda x: (x, ids), batch))
    assert (same["ssim"], same["random_features"]) == (pytest.approx(1), 0)


def test_a_perceptual_weight_of_0_is_a_metric_alone_and_small_frames_are_refused(shards):
    data = ClipDataConfig(shards=shards, clip=ClipConfig(frames=1, size=(8, 8), channels=1))
    perceptual = {"weight": 0, "network": {"kind": "random_features"}}
    task = TokenizerTask(MODEL, TokenizerLossConfig.model_validate({"perceptual": perceptual}), data, seed=0)
    assert task.weights == {"l1": 1}
    assert "random_features" in task.metrics
    assert task.networks() == [task.perceptual]
    within = {id(module) for layer in task.layers() for module in layer.modules()}
    assert all(id(m) in within for m in task.model.modules() if isinstance(m, ResidualBlock | CausalUpsample))
    with pytest.raises(UsageError, match=r"loss\.perceptual, for data\.clip: LPIPS needs frames of 16x16 at least"):
        TokenizerTask(MODEL, TokenizerLossConfig.model_validate({"perceptual": {}}), data, seed=0)


def test_small_frames_have_no_ssim(shards):
    data = ClipDataConfig(shards=shards, clip=ClipConfig(frames=1, size=(32, 32), channels=1))
    smaller = data.model_copy(update={"clip": data.clip.model_copy(update={"size": (8, 4)})})
    model = MODEL.model_copy(update={"patch": 4})
    metrics = [TokenizerTask(model, TokenizerLossConfig(), some, 0).metrics for some in (data, smaller)]
    assert ["ssim" in names for names in metrics] == [True, False]
