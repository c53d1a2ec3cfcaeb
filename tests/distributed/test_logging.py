"""What a training writes for a person to look at, in two processes."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stpredict.quantizers.code_use import perplexity
from stpredict.run import Run
from tests.distributed.toy import WIDTH, run_ranks, sample

TRAINING = {
    "steps": 6,
    "batch_size": 8,
    "precision": "fp32",
    "optimizer": {"lr": 0.01},
    "log_every": 3,
    "validate_every": 3,
    "picture_every": 3,
    "checkpoint": {"every": 6},
    "peak_tflops": 1e-3,
}


def trial(run: str, rich: bool = False, **training) -> dict:
    return {"run": run, "rich": rich, "training": {**TRAINING, **training}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logged")
    run_ranks([trial("plain", micro_batch_size=2), trial("rich", rich=True, zero_stage=3)], folder, 2)
    return folder


def train_rows(run: Run) -> list[dict]:
    return [row for row in run.metrics() if row["split"] == "train"]


def codes(first_step: int, last_step: int) -> torch.Tensor:
    """Uses of the toy's codes in these steps, worked out from its samples."""
    uses = Counter(int(sample(n)[0].argmax()) for n in range((first_step - 1) * 8, last_step * 8))
    return torch.tensor([uses[code] for code in range(WIDTH)])


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_a_line_has_times_throughput_memory_and_samples(runs, name):
    rows = train_rows(Run(runs / name))
    assert [row["step"] for row in rows] == [1, 3, 6]
    for row in rows:
        assert 0 < row["step_s_p50"] <= row["step_s_p90"] <= row["step_s_p99"]
        assert row["tokens_per_s"] == pytest.approx(WIDTH * row["samples_per_s"])
        assert row["mfu"] == pytest.approx(row["tflops"] / 1e-3)
        # Of each of two ranks: three forwards' worth, of two linear layers, for each of four samples.
        of_step = 3 * 4 * 2 * (WIDTH * 16 * 2 + (WIDTH * WIDTH if name == "rich" else 0))
        assert row["tflops"] * row["step_s"] * 1e12 == pytest.approx(of_step)
        assert row["rss_gb"] > 0.1
        assert row["host_free_gb"] > 0
        assert 0 <= row["data_wait_share"] <= 1
        assert (row["samples_replaced"], row["samples_quarantined"]) == (0, 0)
    assert ("discriminator_lr" in rows[0]) == (name == "rich")


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_codebook_use_is_that_of_all_ranks_samples_since_the_last_line(runs, name):
    for row, (first, last) in zip(train_rows(Run(runs / name)), ((1, 1), (2, 3), (4, 6)), strict=True):
        uses = codes(first, last)
        assert row["code_perplexity"] == pytest.approx(perplexity(uses))
        assert row["code_used_share"] == (uses > 0).float().mean()


def test_tensorboard_has_the_same_numbers_and_pictures(runs):
    run = Run(runs / "plain")
    events = EventAccumulator(str(run.tensorboard)).Reload()
    for row in run.metrics():
        for name in row.keys() - {"step", "split", "time"}:
            (value,) = [e.value for e in events.Scalars(f"{row['split']}/{name}") if e.step == row["step"]]
            assert value == pytest.approx(row[name], rel=1e-6)
    assert [event.step for event in events.Images("val/picture")] == [3, 6]
