"""Trains a tokenizer or a prior: the config says which. Ends with an export of the last step."""

import hashlib

import torch

from stpredict.config import flat
from stpredict.exports import export_checkpoint
from stpredict.jobs.config import PriorJobConfig, Resources, TokenizerJobConfig
from stpredict.priors.task import PriorTask
from stpredict.run import Run
from stpredict.tokenizers.task import TokenizerTask
from stpredict.training.checkpoint import newest_checkpoint
from stpredict.training.engine import Trainer
from stpredict.training.ranks import join_ranks
from stpredict.training.task import Task

TrainConfig = TokenizerJobConfig | PriorJobConfig


def run(config: TrainConfig, run: Run) -> None:
    with join_ranks() as ranks:
        torch.manual_seed(config.seed)
        task = build_task(config)
        Trainer(task, config.training, run, ranks, config_hash(config), config.seed).train()
        if ranks.is_main:
            export_checkpoint(newest_checkpoint(run.checkpoints), run.export)
        ranks.barrier()


def build_task(config: TrainConfig) -> Task:
    match config:
        case TokenizerJobConfig():
            return TokenizerTask(config.model, config.loss, config.data, config.seed)
        case PriorJobConfig():
            return PriorTask(config.model, config.data, config.tokenizer, config.given_frames, config.seed)


def config_hash(config: TrainConfig) -> str:
    """Hash of what decides the weights: not of where the run stands, what it runs on or how its data are loaded."""
    what = config.model_copy(update={"resources": Resources()}).model_dump(mode="json")
    return hashlib.sha256(repr(sorted(config.decisive(flat(what)).items())).encode()).hexdigest()[:16]
