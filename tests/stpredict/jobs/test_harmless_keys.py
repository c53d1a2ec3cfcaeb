"""Which keys decide what a job makes, and which it may be continued with others of."""

import shutil
from pathlib import Path

import pytest

from launcher.rundir import changed_keys, fingerprint
from stpredict.config import as_yaml, load
from stpredict.jobs.config import (
    AnyJobConfig,
    EncodeConfig,
    GenerateConfig,
    PriorJobConfig,
    ShardConfig,
    TokenizerJobConfig,
)
from stpredict.run import Run

TRAINING = {"steps": 1, "batch_size": 2}
CONFIGS = {
    "shard": (ShardConfig, {"source": {"kind": "folder", "path": "videos"}}),
    "encode": (EncodeConfig, {"tokenizer": "t", "data": {"shards": "s"}}),
    "generate": (GenerateConfig, {"prior": "p", "tokenizer": "t", "data": {"shards": "s"}}),
    "tokenizer": (TokenizerJobConfig, {"data": {"shards": "s"}, "training": TRAINING}),
    "prior": (PriorJobConfig, {"tokenizer": "t", "data": {"latents": "l"}, "training": TRAINING}),
}
TRAINED = ("tokenizer", "prior")
OTHERWISE = TRAINING | {"zero_stage": 3, "micro_batch_size": 1, "log_every": 9, "validate_every": 9, "picture_every": 9}
OTHERWISE |= {
    "checkpoint": {"every": 9, "keep": 9, "best": {"metric": "psnr"}, "max_bytes": "2TB", "background": False}
}
LOADERS = {"workers": 9, "timeout_s": 9, "max_bad_fraction": 0.9, "buffer_bytes": 9, "cache": {"folder": "c"}}


def config(kind, **changes):
    cls, values = CONFIGS[kind]
    data = {"data": {**values["data"], **changes.pop("data", {})}} if "data" in values else {}
    return cls.model_validate({"run": "run", **values, **data, **changes})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("shard", {"workers": 9, "resources": {"processes": 9, "threads": 9}}),
        ("encode", {"data": LOADERS, "resources": {"processes": 9, "threads": 9}}),
        ("generate", {"data": LOADERS, "resources": {"threads": 9}}),
        *((kind, {"data": LOADERS, "resources": {"processes": 9}, "training": OTHERWISE}) for kind in TRAINED),
    ],
)
def test_a_job_goes_on_with_other_processes_and_loaders_where_they_change_nothing(kind, changes, tmp_path):
    before, after = config(kind), config(kind, **changes, run="elsewhere")
    run = Run(tmp_path)
    run.write_config(as_yaml(before))
    assert changed_keys(run, after) == []
    assert fingerprint(before) == fingerprint(after)


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("shard", {"window_bytes": 9}, "window_bytes"),
        ("encode", {"data": {"virtual_streams": 9}}, "data.virtual_streams"),
        ("tokenizer", {"data": {"virtual_streams": 9}}, "data.virtual_streams"),
        ("prior", {"data": {"virtual_streams": 9}}, "data.virtual_streams"),
        ("prior", {"seed": 9}, "seed"),
        ("tokenizer", {"training": TRAINING | {"ema_decay": 0.9}}, "training.ema_decay"),
        ("prior", {"training": TRAINING | {"steps": 2}}, "training.steps"),
    ],
)
def test_a_job_does_not_go_on_with_what_changes_its_result(kind, changes, key, tmp_path):
    before, after = config(kind), config(kind, **changes)
    run = Run(tmp_path)
    run.write_config(as_yaml(before))
    assert [change.split(":")[0] for change in changed_keys(run, after)] == [key]
    assert fingerprint(before) != fingerprint(after)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_run_of_the_first_version_continues_with_its_own_config_and_is_the_same_to_pipelines(kind, tmp_path):
    """``first_version`` holds what commit c588178 wrote: new keys must be absent, or harmless, where they are off."""
    run = Run(tmp_path)
    shutil.copy(Path(__file__).parent / "first_version" / f"{kind}.yaml", run.config_path)
    config = load(AnyJobConfig, run.config_path)
    assert config.training.discriminator.optimizer.lr == 0.002
    assert changed_keys(run, config) == []
    assert fingerprint(config)[:16] == {"tokenizer": "c3f3d4b973f49cba", "prior": "bd10d1d2e966cbf6"}[kind]
    other = config.model_copy(update={"training": config.training.model_copy(update={"ema_decay": 0.99})})
    assert changed_keys(run, other) == ["training.ema_decay: 0.9 → 0.99"]
