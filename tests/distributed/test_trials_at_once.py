"""Trials that train at once on this machine end with the weights of trials that train one after another."""

from pathlib import Path

import pytest
import yaml

from launcher.config import LocalCluster
from launcher.launch import launch
from launcher.study import load_study
from stpredict.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINING = {"steps": 4, "batch_size": 4, "log_every": 1, "precision": "fp32", "checkpoint": {"every": 1000}}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def trained(tmp_path):
    """``trained(name, cluster)``: job → its exported weights, of two seeds that train a tokenizer."""

    def train(name: str, cluster: LocalCluster) -> dict[str, bytes]:
        shards = {"config": str(CONFIGS / "data/moving_digits.yaml"), "set": {"source": {"videos": 24}}}
        tokenizer = {
            "config": str(CONFIGS / "tokenizers/demo.yaml"),
            "needs": ["shards"],
            "set": {
                "resources": {"processes": 1},
                "data": {"shards": "${run:shards}", "workers": 0},
                "training": TRAINING,
            },
        }
        study = {"kind": "study", "name": name, "run": str(tmp_path / name), "jobs": {"shards": shards}}
        study["grid"] = {"seed": {"key": "tokenizer.set.seed", "values": [0, 1]}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**study, "trial": {"tokenizer": tokenizer}}))
        _, pipeline, jobs = load_study(path)
        assert launch(pipeline, jobs, cluster) == 0
        runs = {job.name: Run(job.run.path) for job in jobs if job.trial}
        began, ended = zip(*((run.status().started, run.status().finished) for run in runs.values()), strict=True)
        assert (max(began) < min(ended)) == (cluster.jobs == 2)
        return {name: (run.path / "export" / "model.safetensors").read_bytes() for name, run in runs.items()}

    return train


def test_two_at_once_end_with_the_weights_of_one_after_another_to_the_byte(trained):
    alone = trained("alone", LocalCluster(threads=1))
    together = trained("together", LocalCluster(jobs=2, threads=1))
    assert len(set(alone.values())) == 2
    assert together == alone
