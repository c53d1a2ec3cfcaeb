"""Trains a tokenizer, a prior or a forecaster: the config says which. Ends with an export of the last checkpoint, or
of the best."""

import logging
import os
from pathlib import Path

import torch

from data_pipeline.shard_set import read_set
from stpredict.config import flat
from stpredict.exports import export_checkpoint, load_tokenizer
from stpredict.forecasters.build_task import build_forecaster_task
from stpredict.forecasters.scaling import read_scalings
from stpredict.jobs.config import FORCE, ForecasterJobConfig, PriorJobConfig, TokenizerJobConfig
from stpredict.jobs.requeue import requeue
from stpredict.priors.config import given_latent_frames
from stpredict.priors.data import TrainedTokenizer, check_latent, open_data
from stpredict.priors.task import PriorTask
from stpredict.run import Run
from stpredict.tokenizers.task import TokenizerTask
from stpredict.training.checkpoint import best_checkpoint
from stpredict.training.determinism import make_deterministic
from stpredict.training.engine import Trainer
from stpredict.training.ranks import join_ranks
from stpredict.training.signals import sparing_children
from stpredict.training.task import Task

log = logging.getLogger(__name__)
TrainConfig = TokenizerJobConfig | PriorJobConfig | ForecasterJobConfig


def run(config: TrainConfig, run: Run) -> None:
    if config.training.deterministic:
        make_deterministic()
    with join_ranks() as ranks:
        torch.manual_seed(config.seed)
        identity = config.decisive(flat(config.model_dump(mode="json")))
        force = bool(os.environ.get(FORCE))
        if isinstance(config, ForecasterJobConfig) and config.model.padding_note:
            log.log(ranks.warning, "%s", config.model.padding_note)
        task = build_task(config)
        with sparing_children():  # DeepSpeed may have an op compiled
            trainer = Trainer(
                task, config.training, run, ranks, identity, config.seed, force, config.init_from, requeue
            )
        trainer.train()
        if ranks.is_main:
            run.update_status(phase="exporting")
            export_checkpoint(_to_export(config, run) or trainer.saver.newest, run.export)
        ranks.barrier()


def _to_export(config: TrainConfig, run: Run) -> Path | None:
    """The best checkpoint, where the config wants it and there is one that was validated."""
    best = config.training.checkpoint.best
    if config.training.export == "last":
        return None
    found = best_checkpoint(run.checkpoints, best.metric, best.mode)
    if found is None:
        log.warning("no checkpoint was saved with a validation's %s: the last one is exported", best.metric)
    else:
        log.info("%s, the best by %s, is exported", found.name, best.metric)
    return found


def build_task(config: TrainConfig) -> Task:
    match config:
        case TokenizerJobConfig():
            read_set(config.data.shards, "val")  # a missing one is said now, not at the first validation
            return TokenizerTask(config.model, config.loss, config.data, config.seed)
        case PriorJobConfig():
            tokenizer = TrainedTokenizer(config.tokenizer, *load_tokenizer(config.tokenizer))
            data = open_data(config.data, tokenizer, config.seed)
            given = given_latent_frames(config.given_frames, data.clip, tokenizer.export.model, config.model)
            task = PriorTask(config.model, data, tokenizer, given, config.loss_from, config.seed)
            check_latent(config.latent, data, task.prefixes)
            return task
        case ForecasterJobConfig():
            scalings = read_scalings(config.data, config.model.channels)
            return build_forecaster_task(config.model, config.loss, config.data, scalings, config.seed)
