"""Run directories of a study as its trainings leave them, of losses that follow a known law: nothing is trained."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from stpredict.jobs.config import StudyReportConfig
from stpredict.run import Run
from stpredict.studies.config import Role

E, A, ALPHA, B, BETA = 1.7, 40.0, 0.32, 90.0, 0.35
TOKENS, STEPS, EVERY = 4096, 400, 25
STARTED = "2026-11-21T10:00:00+00:00"


def loss_of(parameters: float, tokens: float) -> float:
    """L(N, D) = E + A N^-alpha + B D^-beta."""
    return E + A * parameters**-ALPHA + B * tokens**-BETA


def write_training(
    path: Path,
    parameters: int,
    lr: float = 1e-3,
    penalty: float = 0.0,
    state: str = "done",
    steps: int = STEPS,
    until: int | None = None,
    diverges: int | None = None,
    block: tuple[int, ...] = (1, 1, 8),
    **status: str,
) -> Run:
    """``penalty``: of the loss; ``until``: the last step written; ``diverges``: the step from which losses grow."""
    run = Run(path)
    path.mkdir(parents=True)
    config = {"kind": "prior", "run": str(path), "resources": {"processes": 1}, "model": {"block": list(block)}}
    run.write_config(yaml.safe_dump({**config, "training": {"optimizer": {"lr": lr}}}))
    run.update_status(kind="prior", state=state, step=until or steps, steps=steps, started=STARTED, host="node7")
    if state == "done":
        run.update_status(finished="2026-11-21T10:04:00+00:00")
    if status:
        run.update_status(**status)
    scale = {"parameters": parameters, "embedding_parameters": parameters // 10, "tokens_per_step": TOKENS}
    run.scale_path.write_text(json.dumps({**scale, "flops_per_step": 6.0 * parameters * TOKENS}))
    rows = []
    for step in range(EVERY, (until or steps) + 1, EVERY):
        loss = loss_of(parameters, step * TOKENS) + penalty
        if diverges is not None and step > diverges:
            loss *= 1.6 ** ((step - diverges) / EVERY)
        memory = {"step_s": 0.5, "rss_gb": 1 + parameters / 1e7}
        rows.append({"step": step, "split": "train", "loss": loss, "cross_entropy": loss, **memory})
        rows.append({"step": step, "split": "val", "cross_entropy": loss})
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.environment_path.write_text(json.dumps({"git_commit": "abc123" * 7, "cpus": 2, "cpu": "A CPU"}))
    return run


def config_of(folder: Path, axes: Mapping[str, Role], trials: Mapping[str, Mapping], **keys) -> StudyReportConfig:
    """``trials``: name → its place; their training is FOLDER/NAME-prior."""
    found = {name: {"at": dict(at), "runs": {"prior": folder / f"{name}-prior"}} for name, at in trials.items()}
    return StudyReportConfig(run=folder / "report", title="a study", axes=dict(axes), trials=found, **keys)


def write_sizes(folder: Path, sizes: Mapping[str, int], seeds: int = 2, **keys) -> StudyReportConfig:
    """A study of sizes (label → N) and seeds, all done. Seeds differ by a hundredth of the loss' law at most."""
    trials = {}
    for size, parameters in sizes.items():
        for seed in range(seeds):
            trials[f"{size}-seed{seed}"] = {"size": size, "seed": f"seed{seed}"}
            write_training(folder / f"{size}-seed{seed}-prior", parameters, penalty=0.01 * (seed - (seeds - 1) / 2))
    return config_of(folder, {"size": "size", "seed": "seed"}, trials, **keys)
