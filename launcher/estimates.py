"""``stpredict estimate``: what a training takes, before it is begun."""

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from stpredict.config import apply_overrides, read_yaml, resolve, validate
from stpredict.jobs.config import AnyJobConfig, JobConfig, TrainingJobConfig

OPEN = "(open)"  # stands for a value that a config leaves open (???): an estimate needs no data


def load_training(path: Path, overrides: Sequence[str]) -> TrainingJobConfig:
    """The config of a training, in which paths may be left open (???)."""
    node = apply_overrides(read_yaml(path), overrides)
    for key in OmegaConf.missing_keys(node):
        OmegaConf.update(node, key, {"latents": OPEN} if key == "data" else OPEN)
    config: JobConfig = validate(AnyJobConfig, resolve(node, path), path)
    if not isinstance(config, TrainingJobConfig):
        raise UsageError(f"{path} has kind {config.kind}: only trainings are estimated")
    return config


def estimate(path: Path, overrides: Sequence[str], as_json: bool) -> None:
    config = load_training(path, overrides)
    from stpredict.estimates.planned import plan_training
    from stpredict.estimates.size import size_of

    size = size_of(plan_training(config))
    facts = {"parameters": size.parameters, "macs_forward": size.flops_forward / 2}
    print(json.dumps(facts, indent=1) if as_json else facts)
