"""Trains tokenizers or priors as their configs say, several after one another in the same ranks.

Run as ``python tokenizer_trainings.py OUT`` with a JSON list of trials on standard input, in every rank; a trial is a
config, a tokenizer's unless it says its ``kind``, with ``until`` where a signal is to stop it after that step.
"""

import json
import sys
from pathlib import Path

import torch

from launcher.rank import leave
from stpredict.config import flat, validate
from stpredict.jobs.config import AnyJobConfig
from stpredict.jobs.train import build_task
from stpredict.run import Run
from stpredict.training.engine import Trainer
from stpredict.training.ranks import join_ranks
from stpredict.training.signals import Preempted
from tests.distributed.toy import _signal_after


def main(out: Path) -> None:
    with join_ranks() as ranks:
        for trial in json.load(sys.stdin):
            until = trial.pop("until", None)
            config = validate(AnyJobConfig, {"kind": "tokenizer", **trial, "run": out / trial["run"]}, "trial")
            torch.manual_seed(config.seed)
            run = Run(config.run)
            if ranks.is_main:
                run.update_status(kind=config.kind, state="running")
            ranks.barrier()
            identity = config.decisive(flat(config.model_dump(mode="json")))
            trainer = Trainer(build_task(config), config.training, run, ranks, identity, config.seed)
            if until is not None and ranks.is_main:
                _signal_after(trainer, until)
            try:
                trainer.train()
            except Preempted:
                assert until == trainer.step
            if ranks.is_main:
                print(json.dumps({"step": trainer.step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
