import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from data_pipeline.shard_set import read_set
from stpredict.forecasters.config import (
    AffineScaling,
    ForecasterDataConfig,
    StandardScaling,
    UnitScaling,
)
from stpredict.forecasters.scaling import Scaling, read_scalings, scaling_of
from tests.stpredict.forecasters.fields import SIZE, STEPS, moving_field

TRAINED, HELD_OUT = moving_field(STEPS, *SIZE)[:48], moving_field(STEPS, *SIZE)[48:]


def of_field(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = field.astype(np.float64).reshape(-1, 2)
    return values.mean(0), values.std(0)


def test_fields_are_standardised_by_the_training_split_and_come_back_in_their_units(field_shards):
    training, validation = read_scalings(ForecasterDataConfig(shards=field_shards), 2)
    assert training == validation
    mean, deviation = of_field(TRAINED)
    np.testing.assert_allclose(training.offset, mean, rtol=1e-6)
    np.testing.assert_allclose(training.scale, deviation, rtol=1e-6)
    assert (training.channels, training.units) == (("warm", "damp"), ("K", "g/kg"))
    clip = torch.from_numpy(HELD_OUT[None])
    scaled = training.scaled(clip)
    assert scaled.shape == (1, 2, len(HELD_OUT), *SIZE)
    expected = (HELD_OUT.astype(np.float64) - mean) / deviation
    np.testing.assert_allclose(scaled[0].numpy(), expected.transpose(3, 0, 1, 2), atol=1e-4)
    torch.testing.assert_close(training.physical(scaled), clip, rtol=1e-6, atol=1e-4)


def test_own_statistics_are_those_of_the_split_that_is_validated(field_shards):
    data = ForecasterDataConfig(shards=field_shards, scaling=StandardScaling(statistics="own"))
    training, validation = read_scalings(data, 2)
    np.testing.assert_allclose(training.offset, of_field(TRAINED)[0], rtol=1e-6)
    np.testing.assert_allclose(validation.offset, of_field(HELD_OUT)[0], rtol=1e-6)


def test_video_is_scaled_to_one(video_shards):
    scaling, _ = read_scalings(ForecasterDataConfig(shards=video_shards), 1)
    clip = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3, 1)
    torch.testing.assert_close(scaling.scaled(clip).flatten(), torch.tensor([0.0, 0.2, 1.0]))


def test_an_affine_scaling_is_of_each_channel_or_of_all(field_shards):
    manifest = read_set(field_shards, "train").manifest
    scaling = scaling_of(AffineScaling(offset=(1.0, 2.0), scale=(4.0,)), 2, "x", manifest)
    clip = torch.tensor([5.0, 10.0]).view(1, 1, 1, 1, 2)
    assert scaling.scaled(clip).flatten().tolist() == [1.0, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scaling_does_not_wait_for_the_gpu():
    clip = torch.zeros(1, 2, 3, 4, 2, device="cuda")
    scaling = Scaling((1.0, 2.0), (4.0, 5.0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaled = scaling.scaled(clip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scaled[0, :, 0, 0, 0].tolist() == pytest.approx([-0.25, -0.4])


def test_what_does_not_fit_the_shards_is_refused_in_a_line(field_shards, video_shards):
    field, video = (read_set(shards, "train").manifest for shards in (field_shards, video_shards))
    bare = field.model_copy(update={"moments": None})
    flat = field.moments.model_copy(update={"m2": [1.0, 0.0]})
    cases = [
        (None, 3, field, r"x: holds 2 channels \(warm, damp\), model\.channels is 3"),
        (None, 2, video, r"x: holds video of 1 or 3 channels, model\.channels is 2"),
        (None, 2, bare, r"x: a field without statistics"),
        (UnitScaling(), 2, field, r"data\.scaling unit is for uint8, the set holds float32"),
        (StandardScaling(), 1, video, r"data\.scaling standard is for fields, the set holds uint8"),
        (AffineScaling(offset=(0.0, 1.0, 2.0)), 2, field, r"data\.scaling\.offset: 3 values for 2 channels"),
        (None, 2, field.model_copy(update={"moments": flat}), r"channel damp is the same everywhere"),
    ]
    for config, channels, manifest, message in cases:
        with pytest.raises(UsageError, match=message):
            scaling_of(config, channels, "x", manifest)
    missing = ForecasterDataConfig(shards="nowhere", made_with="make them with `stpredict shard field.yaml`")
    with pytest.raises(UsageError, match=r"nowhere.train: no shard set here; make them with `stpredict shard field"):
        read_scalings(missing, 2)
