"""What the trials of a study found so far: each one's curve of validation losses, and what it took. Torch-free."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UsageError
from stpredict.run import Run, Status
from stpredict.studies.config import TrialConfig
from stpredict.training.scale import Scale, read_scale

TRAINING = ("tokenizer", "prior")
METRICS = {"tokenizer": "mse", "prior": "cross_entropy"}  # of a validation: what is less the better a model is


@dataclass
class TrialPoints:
    """``steps`` and ``losses`` are those of the validations. ``diverged`` says how, if it did: such a trial is shown,
    and no part of any fit."""

    name: str
    at: Mapping[str, str]
    run: Run
    kind: str | None = None
    status: Status | None = None
    scale: Scale | None = None
    learning_rate: float | None = None
    metric: str | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.status is not None and self.status.state == "done"


def read_trial(name: str, trial: TrialConfig, metric: str | None = None) -> TrialPoints:
    """What the trial's training has left: the first of its jobs that trains. What cannot be read stands in
    ``problems``."""
    runs = [Run(path) for path in trial.runs.values()]
    run = next((run for run in runs if (_config(run) or {}).get("kind") in TRAINING), runs[0])
    points = TrialPoints(name, trial.at, run)
    config = _config(run)
    if config is None:
        return points
    points.kind, points.metric = config["kind"], metric or METRICS[config["kind"]]
    points.learning_rate = config["training"]["optimizer"]["lr"]
    try:
        points.status, points.scale = run.status(), read_scale(run.scale_path)
    except UsageError as error:
        points.problems.append(str(error))
    rows = run.metrics()
    validations = [row for row in rows if row.get("split") == "val" and points.metric in row]
    points.steps = [row["step"] for row in validations]
    points.losses = [row[points.metric] for row in validations]
    points.diverged = _how_it_diverged(points, [row for row in rows if row.get("split") == "train"])
    return points


def _config(run: Run) -> dict[str, Any] | None:
    try:
        return yaml.safe_load(Path(run.config_path).read_text())
    except FileNotFoundError:
        return None


def _how_it_diverged(points: TrialPoints, training: list[dict[str, Any]]) -> str | None:
    bad = next((step for step, loss in zip(points.steps, points.losses, strict=True) if not math.isfinite(loss)), None)
    if bad is not None:
        return f"its validation at step {bad} is not finite"
    losses = [row["loss"] for row in training if "loss" in row]
    if len(losses) > 1 and losses[-1] > losses[0]:
        return f"its training loss ended at {losses[-1]:.4g}, above the {losses[0]:.4g} that it began at"
    return None
