"""Compiled layers, in two processes on CPU: the same training."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.errors import UsageError
from stpredict.run import Run
from stpredict.training.compilation import compiles
from stpredict.training.config import TrainingConfig
from tests.distributed import deep_toy
from tests.distributed.test_engine import STAGES, last_weights, trial
from tests.distributed.toy import run_ranks

RECOMPUTED = {"activation_checkpointing": {"policy": "layers"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    trials = []
    for stage in STAGES:
        gathered = {"zero_optimization": {"param_persistence_threshold": 0}} if stage == 3 else {}
        settings = {"zero_stage": stage, "steps": 3, "deepspeed": gathered}
        trials.append(trial(f"{stage}_eager", training={**settings, "compile": False}))
        trials.append(trial(f"{stage}_compiled", training={**settings, "compile": True}))
    trials.append(trial("2_recomputed", training={"zero_stage": 2, "steps": 3, "compile": True, **RECOMPUTED}))
    out = tmp_path_factory.mktemp("compiled")
    run_ranks(trials, out, 2, timeout_s=500, script=deep_toy.__file__)
    return out


@pytest.mark.parametrize("name", [*(f"{stage}_compiled" for stage in STAGES), "2_recomputed"])
def test_losses_and_weights_are_those_of_the_layers_as_they_are(folder, name):
    runs = [Run(folder / run) for run in (f"{name[0]}_eager", name)]
    eager, compiled = ([row["loss"] for row in run.metrics() if row["split"] == "train"] for run in runs)
    assert compiled == pytest.approx(eager, rel=1e-5)
    weights, again = (last_weights(run) for run in runs)
    assert weights.keys() == again.keys()
    for key, expected in weights.items():
        torch.testing.assert_close(again[key], expected, rtol=1e-5, atol=1e-5)


def test_auto_compiles_on_cuda_what_can_be_and_what_is_asked_for_in_vain_is_refused():
    layers, cpu, cuda = [nn.Linear(1, 1)], torch.device("cpu"), torch.device("cuda")
    selective = {"activation_checkpointing": {"policy": "selective"}}

    def does(device: torch.device, layers: list = layers, **settings) -> bool:
        return compiles(layers, TrainingConfig(steps=1, batch_size=1, **settings), device)

    assert [does(cuda, zero_stage=stage) for stage in STAGES] == [True, True, True, False]
    assert not any([does(cpu), does(cuda, []), does(cuda, **selective), does(cuda, compile=False)])
    assert does(cpu, compile=True, zero_stage=3)
    with pytest.raises(UsageError, match="names no layers"):
        does(cuda, [], compile=True)
    with pytest.raises(UsageError, match="selective keeps is not seen in compiled code"):
        does(cuda, compile=True, **selective)
