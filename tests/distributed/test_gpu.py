"""The engine on a CUDA device, against plain PyTorch on the CPU and against itself."""

import pytest
import torch

from stpredict.run import Run
from tests.distributed.test_engine import STAGES, assert_same_bits, reference, trial, whole_state  # noqa: F401
from tests.distributed.toy import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
SETTINGS = [(precision, stage, {}) for precision in TOLERANCE for stage in STAGES]
SETTINGS += [("bf16", stage, {"offload": {"optimizer": "cpu"}}) for stage in (1, 2, 3)]
SETTINGS += [("bf16", 3, {"offload": {"optimizer": "cpu", "parameters": "cpu"}})]
NAMES = [
    f"{precision}_{stage}{'_' if more else ''}{'_'.join(more.get('offload', ()))}"
    for precision, stage, more in SETTINGS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every setting: trained through; and stopped after step 4 and continued, with dropout and everything a checkpoint
    holds."""
    trials = []
    for name, (precision, stage, more) in zip(NAMES, SETTINGS, strict=True):
        settings = {"precision": precision, "zero_stage": stage, "deterministic": True, **more}
        # A scale that no gradient of the toy overflows at.
        settings |= {"deepspeed": {"fp16": {"initial_scale_power": 8}}} if precision == "fp16" else {}
        trials.append(trial(name, training=settings))
        rich = {"training": settings | {"ema_decay": 0.9}, "dropout": 0.5, "rich": True}
        trials += [
            trial(f"{name}_whole", **rich),
            trial(f"{name}_again", until=4, **rich),
            trial(f"{name}_again", **rich),
        ]
    out = tmp_path_factory.mktemp("gpu")
    run_ranks(trials, out, 1, cuda=True)
    return out


@pytest.mark.parametrize(("name", "setting"), list(zip(NAMES, SETTINGS, strict=True)), ids=NAMES)
def test_losses_are_those_of_plain_pytorch(folder, reference, name, setting):  # noqa: F811
    losses = [row["loss"] for row in Run(folder / name).metrics() if row["split"] == "train"]
    assert losses == pytest.approx(reference[0], rel=TOLERANCE[setting[0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, name):
    assert_same_bits(*(whole_state(Run(folder / f"{name}_{kind}")) for kind in ("whole", "again")))
