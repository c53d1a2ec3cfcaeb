"""The demo's pipeline at the smallest size, through the command line, in real processes with ZeRO-2 and ZeRO-3."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from data_pipeline.config import ClipConfig, ClipDataConfig, LatentDataConfig
from data_pipeline.manifest import read_manifest
from data_pipeline.order import Share
from data_pipeline.stream import clip_evaluation_batches, latent_evaluation_batches
from data_pipeline.transforms import to_video
from stpredict.evaluation.reconstructed import read_reconstructed
from stpredict.exports import find_export, load_prior, load_tokenizer
from stpredict.run import Run
from tests.distributed.command import started, stpredict

PIPELINE = "configs/pipelines/demo.yaml"
JOBS = ("shards", "tokenizer", "latents", "prior", "predictions", "evaluation", "report")


def smallest(run: Path) -> list[str]:
    """The overrides that make the demo take seconds."""
    return [
        f"run={run}",
        "jobs.shards.set.source.videos=24",
        "jobs.shards.set.source.validation_videos=6",
        "jobs.tokenizer.set.training={steps: 6, batch_size: 4, log_every: 1, checkpoint: {every: 2}}",
        "jobs.tokenizer.set.training.precision=fp32",
        "jobs.prior.set.training={steps: 4, batch_size: 4, log_every: 1, checkpoint: {every: 2}}",
        "jobs.prior.set.model={layers: 1, width: 32, mlp_width: 32}",
        "jobs.predictions.set.clips=5",
        "jobs.predictions.set.pictures=2",
    ]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """A finished pipeline run and what the command printed."""
    run = tmp_path_factory.mktemp("demo") / "run"
    done = stpredict("launch", PIPELINE, "--cluster", "local", *smallest(run))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return run, done.stdout


def test_every_job_is_done_and_the_reports_path_is_printed_last(demo):
    run, printed = demo
    assert {job: Run(run / job).status().state for job in JOBS} == dict.fromkeys(JOBS, "done")
    report = run / "report" / "report.html"
    assert printed.strip().splitlines()[-1] == str(report)
    assert "data:image/gif;base64," in report.read_text()


def test_a_second_launch_does_nothing(demo):
    run, _ = demo
    before = {job: Run(run / job).status() for job in JOBS}
    again = stpredict("launch", PIPELINE, "--cluster", "local", *smallest(run))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": up to date") == len(JOBS)
    assert {job: Run(run / job).status() for job in JOBS} == before


def test_a_changed_key_is_named_and_nothing_runs(demo):
    run, _ = demo
    changed = stpredict("launch", PIPELINE, *smallest(run), "jobs.tokenizer.set.training.optimizer.lr=0.5")
    assert changed.returncode == 2
    assert "training.optimizer.lr" in changed.stderr
    assert "--rerun tokenizer" in changed.stderr


def test_runs_hold_what_design_says(demo):
    run, _ = demo
    for job in ("tokenizer", "prior"):
        names = {path.name for path in (run / job).iterdir()}
        assert {"config.yaml", "status.json", "metrics.jsonl", "environment.json"} <= names
        assert {"tensorboard", "logs", "checkpoints", "export"} <= names
        assert (run / job / "logs" / "rank_1.log").stat().st_size > 0
        rows = Run(run / job).metrics()
        assert {row["split"] for row in rows} == {"train", "val"}
        assert all(np.isfinite([v for v in row.values() if isinstance(v, float)]).all() for row in rows)


def test_cached_latents_are_what_the_tokenizer_makes_of_the_clips(demo):
    run, _ = demo
    tokenizer, export, fingerprint = load_tokenizer(run / "tokenizer")
    manifest = read_manifest(run / "latents" / "train")
    assert (manifest.fingerprint, manifest.samples) == (fingerprint, 24)
    clip = ClipConfig(**export.clip.model_dump())
    share = Share(0, 1, 24)
    data = ClipDataConfig(shards=run / "shards", clip=clip, workers=0)
    clips = next(iter(clip_evaluation_batches(data, "train", seed=0, share=share)))
    latents = next(
        iter(latent_evaluation_batches(LatentDataConfig(latents=run / "latents", workers=0), "train", share=share))
    )
    expected = dict(zip(clips["key"], tokenizer.encode(to_video(clips["clip"])), strict=True))
    found = {key.removesuffix("-0"): ids for key, ids in zip(latents["key"], latents["latent"], strict=True)}
    assert found.keys() == expected.keys()
    same = [(found[key] == expected[key]).float().mean().item() for key in found]
    # Another batch size may round one value on a code's border the other way, no more.
    assert np.mean(same) > 0.999


def test_predictions_keep_the_given_frames_and_differ_after(demo):
    run, _ = demo
    samples = run / "predictions" / "samples"
    truth, prediction = (np.load(samples / f"{name}.npy") for name in ("truth", "prediction"))
    assert truth.shape == prediction.shape == (5, 17, 64, 64, 1)
    assert np.array_equal(truth[:, :5], prediction[:, :5])
    assert not np.array_equal(truth[:, 5:], prediction[:, 5:])
    assert len(list(samples.glob("*.gif"))) == len(list(samples.glob("*.mp4"))) == 2
    index = json.loads((samples / "index.json").read_text())
    assert len(set(index["keys"])) == 5
    assert index["given_frames"] == 5


def test_an_export_made_by_hand_equals_the_jobs_own(demo, tmp_path):
    run, _ = demo
    made = stpredict("export", run / "prior", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    ours, again = (load_file(find_export(path) / "model.safetensors") for path in (run / "prior", tmp_path / "out"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    model, config = load_prior(tmp_path / "out")
    assert (config.step, config.grid, model.codebook_size) == (4, (9, 8, 8), 1024)


def test_an_export_never_replaces_other_files(demo, tmp_path):
    run, _ = demo
    (tmp_path / "thesis.txt").write_text("dear")
    refused = stpredict("export", run / "prior", tmp_path)
    assert refused.returncode == 2
    assert "holds other things than an export" in refused.stderr
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_a_prior_of_single_tokens_is_exported_as_a_llama(demo, tmp_path):
    run, _ = demo
    model = "model={layers: 1, width: 32, heads: 2, mlp_width: 32, block: [1, 1, 1], rope_axes: 1}"
    settings = [f"data.latents={run}/latents", f"tokenizer={run}/tokenizer", f"run={tmp_path}/prior", model]
    settings += ["training={steps: 1, batch_size: 2}", "resources.processes=1"]
    trained = stpredict("train", "configs/priors/demo.yaml", *settings)
    assert trained.returncode == 0, trained.stderr
    out = tmp_path / "new" / "llama"
    made = stpredict("export", tmp_path / "prior", out, "--format", "hf-llama")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(out)
    assert {path.name: oct(path.stat().st_mode) for path in out.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors"), oct((tmp_path / "prior" / "config.yaml").stat().st_mode)
    )
    assert [path.name for path in out.parent.iterdir()] == ["llama"]
    ours, llama = load_prior(tmp_path / "prior")[0], transformers.LlamaForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(1024, (1, ours.order.tokens))
    torch.testing.assert_close(llama(ids[:, :-1]).logits, ours(ids), rtol=1e-4, atol=1e-4)
    for source, where, message in (
        (run / "prior", tmp_path / "other", "this prior is no LLaMA: model.block is [1, 1, 8], not [1, 1, 1]"),
        (run / "tokenizer", tmp_path / "other", "is a tokenizer's; a prior is needed"),
        (tmp_path / "prior", out, "is there already; give a folder that is empty or does not exist"),
    ):
        refused = stpredict("export", source, where, "--format", "hf-llama")
        assert (refused.returncode, message in " ".join(refused.stderr.split())) == (2, True), refused.stderr
    assert not (tmp_path / "other").exists()


def test_encoding_fewer_clips_than_ranks_by_the_commands_in_the_configs_heads(demo, tmp_path):
    run, _ = demo
    shards, latents = tmp_path / "shards", tmp_path / "latents"
    settings = ["source.videos=8", "source.validation_videos=1", f"run={shards}"]
    for command in (
        ["shard", "configs/data/moving_digits.yaml", *settings],
        ["encode", "configs/data/encode.yaml", f"tokenizer={run}/tokenizer", f"data.shards={shards}", f"run={latents}"],
    ):
        result = stpredict(*command)
        assert result.returncode == 0, result.stderr
    assert [read_manifest(latents / split).samples for split in ("train", "val")] == [8, 1]
    assert read_manifest(latents / "val").clip.channels == 1  # as the tokenizer was trained


@pytest.fixture(scope="module")
def other_tokenizer(demo, tmp_path_factory) -> Path:
    """The same tokenizer with one weight changed, exported."""
    from safetensors.torch import save_file

    run, _ = demo
    folder = tmp_path_factory.mktemp("other")
    source = find_export(run / "tokenizer")
    weights = load_file(source / "model.safetensors")
    weights["encoder.conv_out.bias"][0] += 1
    save_file(weights, folder / "model.safetensors")
    (folder / "config.yaml").write_text((source / "config.yaml").read_text())
    return folder


def test_two_ranks_reconstruct_all_held_out_clips_between_them(demo, tmp_path):
    run, _ = demo
    job = ["generate", "configs/tokenizers/reconstruct.yaml", f"run={tmp_path / 'r'}", f"tokenizer={run / 'tokenizer'}"]
    done = stpredict(*job, f"data.shards={run / 'shards'}", "resources.processes=2", "batch_size=1", "pictures=1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_reconstructed(Run(tmp_path / "r"))
    assert len(set(found.index.keys)) == read_manifest(run / "shards" / "val").samples > 2
    assert all(clip.any() for clip in found.truth)


def test_bad_inputs_are_one_line_and_exit_2(demo, other_tokenizer, tmp_path):
    run, _ = demo
    empty = tmp_path / "empty"
    empty.mkdir()
    latents, tokenizer = run / "latents", run / "tokenizer"
    generate = ["generate", "configs/priors/generate.yaml", f"run={tmp_path / 'g'}", f"prior={run / 'prior'}"]
    generate += [f"data.shards={run / 'shards'}", "resources.processes=1"]
    reconstruct = ["generate", "configs/tokenizers/reconstruct.yaml", f"run={tmp_path / 'r'}"]
    reconstruct += [f"data.shards={run / 'shards'}", "resources.processes=1"]
    prior = ["train", "configs/priors/demo.yaml", f"data.latents={latents}", "resources.processes=1"]
    trials = {
        "another tokenizer": [*prior, f"run={tmp_path / 'p'}", f"tokenizer={other_tokenizer}"],
        "trained on latents of another tokenizer": [*generate, f"tokenizer={other_tokenizer}"],
        "neither a run with an export nor an export": [*generate, f"tokenizer={empty}"],
        "block 1x3x8 does not divide": [*prior, f"run={tmp_path}/q", f"tokenizer={tokenizer}", "model.block=[1,3,8]"],
        "clips have 3 channels, the tokenizer takes 1": [*generate, f"tokenizer={tokenizer}", "data.clip.channels=3"],
        "given_frames 21: the 11 latent frames they make must": [
            *generate,
            f"tokenizer={tokenizer}",
            "given_frames=21",
        ],
        "does not fit this model: it lacks": [
            *prior,
            f"run={tmp_path}/q",
            f"tokenizer={tokenizer}",
            f"init_from.path={run}/prior",
        ],
        "given_frames: a clip of 4 frames": [*prior, f"run={tmp_path}/q", f"tokenizer={tokenizer}", "given_frames=4"],
        "no run with a complete checkpoint": ["export", empty, tmp_path / "e"],
        "no complete checkpoint of step 7; there are 4, 6": ["export", tokenizer, tmp_path / "e", "--step", "7"],
        "a clip of 17 frames of 60x64 does not fit": [*reconstruct, f"tokenizer={tokenizer}", "data.clip.size=[60,64]"],
        "holds a prior, a tokenizer is needed here": [*reconstruct, f"tokenizer={run / 'prior'}"],
        "a run of kind shard makes no model": [*reconstruct, f"tokenizer={run / 'shards'}"],
        "did you mean 'optimizer'": [*prior, f"tokenizer={tokenizer}", "training.optimiser.lr=1"],
    }
    for message, arguments in trials.items():
        result = stpredict(*arguments)
        assert result.returncode == 2, (arguments, result.stdout[-500:], result.stderr[-1500:])
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        assert len(lines) == 1, result.stderr
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr


def test_killed_or_stopped_in_training_and_run_again_ends_with_the_same_weights(demo, tmp_path):
    run, _ = demo
    config = [run / "tokenizer" / "config.yaml", f"run={tmp_path / 'again'}"]
    again = Run(tmp_path / "again")
    moments = {  # a request to stop may come before the loop has begun
        signal.SIGKILL: lambda: list(again.checkpoints.glob("step_00000002/COMPLETE")),
        signal.SIGTERM: lambda: "continuing from" in again.log_path(0).read_text(),
    }
    for how, moment in moments.items():
        process = started("train", *config)
        _wait_for(moment, process)
        pid = again.status().pid if how == signal.SIGKILL else process.pid
        os.kill(pid, how)  # SIGKILL hits rank 0, SIGTERM the launcher
        assert process.wait(timeout=120) == (1 if how == signal.SIGKILL else 75)
        assert again.status().state == ("failed" if how == signal.SIGKILL else "preempted")
    done = stpredict("train", *config)
    assert done.returncode == 0, done.stderr
    log = again.log_path(0).read_text()
    assert log.count("continuing from") == 2
    ours, uninterrupted = (
        load_file(find_export(path) / "model.safetensors") for path in (again.path, run / "tokenizer")
    )
    assert all(torch.equal(ours[name], uninterrupted[name]) for name in ours)
    steps = [row["step"] for row in again.metrics() if row["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def _wait_for(condition, process, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it was stopped"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_real_videos(test_data, tmp_path):
    overrides = [value for value in smallest(tmp_path / "run") if "shards.set" not in value]
    done = stpredict(
        "launch",
        "configs/pipelines/demo_videos.yaml",
        f"vars.videos={test_data / 'weizmann'}",
        *overrides,
        timeout_s=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    manifest = read_manifest(tmp_path / "run" / "shards" / "train")
    assert len(manifest.classes) == 10
    assert manifest.samples + read_manifest(tmp_path / "run" / "shards" / "val").samples == 90
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["clips"] == 5
