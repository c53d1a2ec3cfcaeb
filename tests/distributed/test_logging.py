"""What a training writes for a person to look at, in two processes."""

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, HistogramEvent

from stpredict.quantizers.code_use import perplexity
from stpredict.run import Run
from stpredict.training.histograms import KINDS
from tests.distributed.test_engine import whole_state
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
    (folder / "plain").mkdir()
    (folder / "plain" / "profile").write_text("2\n")
    profile = {"step": 4, "steps": 1}
    trials = [
        trial("plain", micro_batch_size=2),
        trial("rich", rich=True, zero_stage=3, histogram_every=4, profile=profile),
        trial("rich_0", rich=True, zero_stage=0, histogram_every=4),
    ]
    if importlib.util.find_spec("wandb"):
        trials[0]["training"]["wandb"] = {"project": "toys", "mode": "offline"}
    run_ranks(trials, folder, 2)
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


@pytest.mark.parametrize(("name", "first", "steps"), [("plain", 1, 2), ("rich", 4, 1)])
def test_a_profile_asked_for_by_a_file_or_by_the_config_holds_those_steps_of_every_rank(runs, name, first, steps):
    run = Run(runs / name)
    traces = sorted((run.path / "profiles").iterdir())
    assert [trace.name for trace in traces] == [f"step_{first}_rank_{rank}.json.gz" for rank in (0, 1)]
    assert not (run.path / "profile").exists()
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = Counter(event.get("name") for event in events if event.get("ph") == "X")
        marked = {name for name in names if name.startswith("training step ")}
        assert marked == {f"training step {step}" for step in range(first, first + steps)}
        assert names["aten::tanh"] >= steps
        assert any("backward" in name.lower() for name in names)
        assert any("adam" in name for name in names)


def read_histograms(run: Run) -> dict[tuple[str, int], HistogramEvent]:
    events = EventAccumulator(str(run.tensorboard), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()["histograms"]
    return {(tag, event.step): event.histogram_value for tag in tags for event in events.Histograms(tag)}


@pytest.mark.parametrize("name", ["rich", "rich_0"])
def test_histograms_are_those_of_the_whole_tensors_at_every_stage(runs, name):
    run = Run(runs / name)
    found = read_histograms(run)
    assert {step for _, step in found} == {4, 6}
    state = {key: tensor for key, tensor in whole_state(run).items() if key.split("/")[1] in KINDS}
    trained = {key for key in state if "frozen" not in key and not key.startswith("discriminator/weight/3.")}
    assert {key for key, step in found if step == 6} == trained & {key for key, _ in found}
    for key in trained:
        histogram, tensor = found[key, 6], state[key].double().flatten()
        assert histogram.num == len(tensor) == sum(histogram.bucket)
        assert (histogram.min, histogram.max) == (tensor.min(), tensor.max())
        assert histogram.sum == pytest.approx(tensor.sum().item(), abs=1e-9)
        assert histogram.sum_squares == pytest.approx(tensor.square().sum().item())
        below = [int((tensor <= limit).sum()) for limit in histogram.bucket_limit]
        assert below == torch.tensor(histogram.bucket).cumsum(0).tolist()


def test_no_histograms_unless_they_are_asked_for(runs):
    assert not read_histograms(Run(runs / "plain"))


def test_weights_and_biases_gets_the_run_too_where_it_is_installed(runs):
    pytest.importorskip("wandb")
    (file,) = (runs / "plain" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000
