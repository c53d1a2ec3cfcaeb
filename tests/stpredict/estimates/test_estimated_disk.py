"""Bytes on disk against real checkpoints, exports and latents."""

import numpy as np
import pytest
import torch

from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import merge
from stpredict.estimates.disk import disk_of, latent_cache
from stpredict.exports import PriorExport, TokenizerExport, export_checkpoint
from stpredict.training.checkpoint import bytes_of
from stpredict.training.config import TrainingConfig
from tests.stpredict.estimates.planned import SMALL_PRIOR, SMALL_TOKENIZER, planned_prior, planned_tokenizer
from tests.stpredict.training.made_checkpoint import make_checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "most"),
    [
        ({"every": 100, "keep": 2}, 3),
        ({"every": 100, "keep": 2, "keep_every": 250}, 5),
        ({"every": 500, "keep": 3}, 2),
        ({"every": 100, "keep": 2, "best": {"metric": "accuracy", "keep": 3}}, 6),
    ],
)
def test_most_checkpoints_at_once_are_those_kept_and_one_being_written(checkpoint, most):
    training = TrainingConfig(steps=1000, batch_size=4, validate_every=100, checkpoint=checkpoint)
    disk = disk_of(planned_prior(**SMALL_PRIOR), training, 1)
    assert disk.checkpoints == most
    assert disk.peak == most * disk.checkpoint + disk.export


@pytest.mark.parametrize("kind", ["prior", "tokenizer"])
def test_an_export_is_as_large_as_one_that_is_written(tmp_path, kind):
    if kind == "prior":
        planned = planned_prior(**SMALL_PRIOR)
        sizes = {"codebook_size": 64, "grid": (4, 8, 8), "tokenizer_fingerprint": "0" * 64}
        config = PriorExport(model=planned.config.model, **sizes)
    else:
        planned = planned_tokenizer(**SMALL_TOKENIZER)
        config = TokenizerExport(clip=planned.config.data.clip, model=planned.config.model)
    model = planned.task.model
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        f"model/{'weight' if name in parameters else 'buffer'}/{name}": torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    checkpoint = make_checkpoint(tmp_path / "checkpoints", tensors, export=config.model_dump(mode="json"))
    export_checkpoint(checkpoint, tmp_path / "export")
    estimated = disk_of(planned, planned.config.training, 1).export
    assert estimated == pytest.approx(bytes_of(tmp_path / "export"), rel=0.002)


@pytest.mark.parametrize(("codebook_size", "bytes_per_token"), [(256, 1), (64_000, 2), (100_000, 4)])
def test_a_latent_cache_is_as_large_as_one_that_is_written(tmp_path, codebook_size, bytes_per_token):
    grid, clips = (4, 8, 8), 2000
    writer = LatentWriter(
        tmp_path,
        clips=clips,
        shards=latent_shards(clips, 96),
        grid=grid,
        fingerprint="0" * 64,
        codebook_size=codebook_size,
        classes=[f"class_{number}" for number in range(20)],
    )
    random = np.random.default_rng(0)
    with writer:
        for part in writer.missing:
            ids = random.integers(codebook_size, size=(len(part), *grid))
            labels = random.integers(20, size=len(part)).tolist()
            writer.append(part, ids, [f"v_class_{number:02d}_g01_c{number:05d}" for number in part], labels)
    merge(tmp_path)
    found = latent_cache(grid, codebook_size, clips)
    assert found.per_clip == 256 * bytes_per_token
    assert found.total == pytest.approx(bytes_of(tmp_path), rel=0.02)
