import pytest
import torch

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.losses.config import TokenizerLossConfig
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.tokenizers.task import TokenizerTask


def test_a_clip_that_is_not_finite_gives_a_loss_that_is_not_and_counts_no_code(shards):
    """The engine skips such a step; what is told about codes must not end it first."""
    model = CausalCnnConfig(
        patch=8,
        channels=(16, 16),
        blocks=(0, 0),
        strides=((2, 1, 1),),
        middle_blocks=0,
        groups=8,
        video_channels=1,
        levels=(4, 4, 4),
    )
    data = ClipDataConfig(shards=shards, clip=ClipConfig(frames=9, size=(32, 32), channels=1))
    torch.manual_seed(0)
    task = TokenizerTask(model, TokenizerLossConfig(l1=0, l2=1), data, seed=0)
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
