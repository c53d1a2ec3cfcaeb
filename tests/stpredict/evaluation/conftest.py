"""A pipeline's run directories as its jobs leave them, filled with made-up work: a square that moves."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import Manifest, Shard
from data_pipeline.video_files import write_gif
from stpredict.evaluation.pictures import side_by_side
from stpredict.jobs import evaluate
from stpredict.jobs.config import EvaluateConfig
from stpredict.run import Run

GIVEN, FRAMES, SIZE = 5, 17, 32


@pytest.fixture
def write_generated():
    """``write_generated(run, truth, prediction, reconstruction, tokens, **index)`` fills samples/."""
    return _write_generated


@pytest.fixture
def pipeline(finished_pipeline, tmp_path) -> dict[str, Path]:
    """name → run directory of shard, tokenizer, encode, prior, generate and evaluate: all done, and the test's own."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in finished_pipeline.items()}


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    runs = {name: folder / name for name in ("shard", "tokenizer", "encode", "prior", "generate", "evaluate")}
    for minute, (name, path) in enumerate(runs.items()):
        _finish(Run(path), name, minute)
    _write_manifests(runs["shard"], kind="clips", classes=["run", "walk"])
    _write_manifests(runs["encode"], kind="latents", grid=(5, 8, 8), codebook_size=512, fingerprint="ab" * 32)
    _train(Run(runs["tokenizer"]), lambda x: {"loss": 0.5 * x + 0.05, "psnr": 20 - 8 * x, "codes_used": 400 * (1 - x)})
    _train(Run(runs["prior"]), lambda x: {"loss": 6 * x, "cross_entropy": 2 + 4 * x, "accuracy": 0.6 * (1 - x)})
    _generate(Run(runs["generate"]))
    evaluate.run(EvaluateConfig(run=runs["evaluate"], generated=runs["generate"]), Run(runs["evaluate"]))
    Run(runs["evaluate"]).update_status(state="done")
    return runs


def moving_squares(clips: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, t, h, w, 3): a coloured square that moves one pixel per frame."""
    rng = np.random.default_rng(seed)
    video = np.full((clips, FRAMES, SIZE, SIZE, 3), 20, np.uint8)
    for clip in video:
        (y, x), colour = rng.integers(0, 8, 2), rng.integers(100, 255, 3)
        for t, frame in enumerate(clip):
            frame[y + t // 2 : y + t // 2 + 8, x + t : x + t + 8] = colour
    return video


def noisy(video: np.ndarray, deviation: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, video.shape)
    return (video + noise).round().clip(0, 255).astype(np.uint8)


def _write_generated(run: Run, truth, prediction, reconstruction, tokens, **index) -> None:
    run.samples.mkdir(parents=True, exist_ok=True)
    arrays = {"truth": truth, "prediction": prediction, "reconstruction": reconstruction, "truth_tokens": tokens}
    for name, array in arrays.items():
        np.save(run.samples / f"{name}.npy", array)
    keys = [f"clip-{number}" for number in range(len(truth))]
    facts = {"keys": keys, "given_frames": GIVEN, "codebook_size": 512, "prior_step": 300, **index}
    (run.samples / "index.json").write_text(json.dumps(facts))


def _generate(run: Run) -> None:
    truth = moving_squares(8)
    prediction, reconstruction = noisy(truth, 25), noisy(truth, 12)
    prediction[:, :GIVEN] = truth[:, :GIVEN]
    tokens = np.random.default_rng(2).integers(0, 300, (8, 5, 8, 8))
    _write_generated(run, truth, prediction, reconstruction, tokens)
    for number in range(8):
        clips = {"truth": truth, "prediction": prediction, "reconstruction": reconstruction}
        frames = side_by_side({name: video[number] for name, video in clips.items()}, scale=2)
        write_gif(run.samples / f"{number:03d}_clip-{number}.gif", frames, 10)


def _finish(run: Run, name: str, minute: int) -> None:
    started = datetime(2025, 1, 1, 12, minute, tzinfo=UTC)
    run.update_status(
        kind=name,
        state="done",
        started=started.isoformat(),
        finished=(started + timedelta(seconds=50 + minute)).isoformat(),
        host="node7",
        step=300,
        steps=300,
    )
    run.write_config(f"kind: {name}\nrun: runs/{name}\nresources:\n  processes: 2\n")
    run.write_environment()


def _train(run: Run, at) -> None:
    """``at(x)`` are the metrics when the share x of the training is left."""
    rng = np.random.default_rng(3)
    rows = []
    for step in range(2, 301, 2):
        values = {name: value * (1 + 0.08 * rng.normal()) for name, value in at(np.exp(-step / 60)).items()}
        train = {name: value for name, value in values.items() if name not in ("psnr", "codes_used")}
        cost = {"lr": 1e-3 * (1 - step / 300), "samples_per_s": 41.0, "data_wait_share": 0.02}
        cost |= {"mfu": 0.4, "rss_gb": 1.5, "samples_replaced": 2, "steps_skipped": 1}
        rows.append({"step": step, "split": "train", **train, **cost})
        if step % 50 == 0:
            rows.append({"step": step, "split": "val", **{k: v for k, v in values.items() if k != "loss"}})
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = run.checkpoints / "step_00000300"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 300, "precision": "bf16"}))


def _write_manifests(path: Path, **description) -> None:
    for split, samples in (("train", 2000), ("val", 64)):
        size = samples * 9000
        shard = Shard(
            name="shard-000000",
            samples=samples,
            bytes=size,
            sha256="0",
            window_bytes=[size],
            window_samples=[samples],
        )
        (path / split).mkdir()
        manifest = Manifest(samples=samples, shards=[shard], **description)
        (path / split / "manifest.json").write_text(manifest.model_dump_json(exclude_none=True))
