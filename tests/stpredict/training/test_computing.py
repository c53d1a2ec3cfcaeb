"""Settings of how a step is computed: what is refused, and in which words."""

import pytest
from pydantic import ValidationError

from stpredict.config import differences, flat
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.training.computing import OURS
from stpredict.training.config import TrainingConfig


def training(**settings) -> TrainingConfig:
    return TrainingConfig(steps=1, batch_size=1, **settings)


@pytest.mark.parametrize("key", OURS)
def test_what_we_set_ourselves_is_refused_by_name(key):
    first, *rest = key.split(".")
    settings = {first: {rest[0]: 1} if rest else {"enabled": True}}
    with pytest.raises(ValidationError, match=rf"{key}.* is set by {OURS[key]}"):
        training(deepspeed=settings)


def test_deepspeeds_other_settings_are_tuned_or_named():
    settings = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}, "wall_clock_breakdown": True}
    assert training(deepspeed=settings).deepspeed == settings
    for unknown, hint in (
        ({"zero_optimization": {"overlap_com": 1}}, "did you mean 'zero_optimization.overlap_comm'?"),
        ({"overlap_comm": True}, "did you mean 'zero_optimization.overlap_comm'?"),
        ({"foo": 3}, "there are zero_optimization"),
    ):
        with pytest.raises(ValidationError, match=f"is none of the settings that may be tuned here; {hint}"):
            training(deepspeed=unknown)


def test_offload_goes_with_a_stage_that_has_what_is_offloaded():
    with pytest.raises(ValidationError, match="needs zero_stage 1, 2 or 3"):
        training(zero_stage=0, offload={"optimizer": "cpu"})
    with pytest.raises(ValidationError, match="needs zero_stage 3, and it is 2"):
        training(zero_stage=2, offload={"parameters": "cpu"})
    with pytest.raises(ValidationError, match="a checkpoint is made of views of the state in memory; use cpu"):
        training(zero_stage=3, offload={"optimizer": "nvme"})
    training(zero_stage=3, offload={"optimizer": "cpu", "parameters": "cpu"})


def test_a_run_continues_with_another_way_to_compute_it_and_as_one_that_is_older_than_the_keys():
    def identity(**settings) -> dict:
        config = TokenizerJobConfig(run="r", data={"shards": "x"}, training=training(**settings))
        return TokenizerJobConfig.decisive(flat(config.model_dump(mode="json")))

    other = {
        "offload": {"optimizer": "cpu"},
        "activation_checkpointing": {"policy": "layers"},
        "compile": False,
        "deepspeed": {"zero_optimization": {"overlap_comm": True}},
    }
    assert not differences(identity(), identity(**other))
    assert not [key for key in identity() if key.startswith("training.accumulation_dtype")]
    assert differences(identity(), identity(precision="bf16", accumulation_dtype="bf16"))
