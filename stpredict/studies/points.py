"""What the trials of a study found so far: each one's curve of validation losses, and what it took. Torch-free.

Whatever state a trial's runs are in, they can be read: what is missing or damaged becomes a line in ``problems``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UsageError
from data_pipeline.manifest import find_manifest
from stpredict.evaluation.forecast_scores import ForecastEvaluation
from stpredict.evaluation.generated import Index, Speed
from stpredict.evaluation.quantizer_results import QuantizerAnalysis
from stpredict.evaluation.results import Evaluation
from stpredict.evaluation.run_facts import TRAINING, RunFacts, read_facts
from stpredict.run import Run, Status
from stpredict.studies.config import TrialConfig
from stpredict.studies.divergence import how_it_diverged
from stpredict.training.scale import Scale, read_scale

METRICS = {
    "tokenizer": "mse",
    "prior": "cross_entropy",
    "forecaster": "mse",
}  # of a validation: what is less the better a model is


@dataclass
class TrialPoints:
    """``run``, and what follows it, are of the trial's training: the first of its jobs that trains, or its first job.
    ``steps`` and ``losses`` are those of the validations. ``diverged`` says how, if it did: such a trial is shown, and
    no part of any fit."""

    name: str
    at: Mapping[str, str]
    run: Run
    kind: str | None = None
    status: Status | None = None
    scale: Scale | None = None
    learning_rate: float | None = None
    schedule: str | None = None  # its kind
    warmup_steps: int = 0
    epochs: float | None = None  # how often its training set was seen; None where that is not known
    metric: str | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: str | None = None
    problems: list[str] = field(default_factory=list)  # each names its job
    jobs: dict[str, RunFacts] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # of the training
    rows: list[dict[str, Any]] = field(default_factory=list)  # of its metrics.jsonl

    @property
    def done(self) -> bool:
        """Whether the training is."""
        return self.status is not None and self.status.state == "done"

    @cached_property
    def state(self) -> str:
        """Of all its jobs together, in one word."""
        states = [job.state for job in self.jobs.values()]
        if self.diverged:
            return "diverged"
        for state in ("failed", "preempted", "running", "pending"):
            if state in states:
                return state
        if set(states) == {"done"}:
            return "done"
        return "running" if "done" in states else "not started"

    @property
    def final_loss(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def tokens(self) -> int | None:
        """Seen up to the last validation."""
        return self.steps[-1] * self.scale.tokens_per_step if self.steps and self.scale else None

    @property
    def flops(self) -> float | None:
        """Spent up to the last validation."""
        per_step = self.scale and self.scale.flops_per_step
        return self.steps[-1] * per_step if self.steps and per_step else None

    @property
    def seconds(self) -> float | None:
        """Spent in the steps of the training, over all its starts: each line holds the mean since the one before."""
        spent, before = 0.0, 0
        for row in self.rows:
            if row["split"] == "train" and "step_s" in row:
                spent += row["step_s"] * (row["step"] - before)
                before = row["step"]
        return spent if before else None

    @property
    def memory_gb(self) -> float | None:
        """The most of a rank: of its GPU, or, without one, of the process."""
        seen = [row.get("gpu_reserved_gb", row.get("rss_gb")) for row in self.rows]
        return max(filter(None, seen), default=None)

    @property
    def evaluation(self) -> Evaluation | None:
        return next((job.evaluation for job in self.jobs.values() if job.evaluation), None)

    @property
    def forecast(self) -> ForecastEvaluation | None:
        return next((job.forecast for job in self.jobs.values() if job.forecast), None)

    @property
    def quantizer(self) -> QuantizerAnalysis | None:
        return next((job.quantizer for job in self.jobs.values() if job.quantizer), None)

    @property
    def speed(self) -> Speed | None:
        """Of its sampling."""
        found = (job.index.speed for job in self.jobs.values() if isinstance(job.index, Index) and job.index.speed)
        return next(found, self.evaluation and self.evaluation.speed)

    @property
    def block_tokens(self) -> int | None:
        """That a prior predicts at once."""
        block = _at(self.config, "model", "block")
        return math.prod(block) if isinstance(block, list) else None


def without_tokens(trials: Sequence[TrialPoints]) -> bool:
    """Whether they are known to see none, as forecasters do: no law is one of theirs."""
    scales = [trial.scale for trial in trials if trial.scale]
    return bool(scales) and not any(scale.tokens_per_step for scale in scales)


def read_trial(name: str, trial: TrialConfig, metric: str | None = None) -> TrialPoints:
    """What the trial has left. ``metric``: of the validations (default: the usual one of what it trains)."""
    jobs = {job: read_facts(job, path) for job, path in trial.runs.items()}
    configs = {job: _config(facts) for job, facts in jobs.items()}
    job = next((job for job in jobs if configs[job].get("kind") in TRAINING), next(iter(jobs)))
    facts, config = jobs[job], configs[job]
    problems = [f"{job}: {problem}" for job, of_job in jobs.items() for problem in of_job.problems]
    points = TrialPoints(name, trial.at, facts.run, status=facts.status, jobs=jobs, problems=problems)
    if config.get("kind") not in TRAINING:
        return points
    points.kind, points.config, points.rows = config["kind"], config, facts.rows
    points.metric = metric or METRICS[points.kind]
    points.learning_rate = _at(config, "training", "optimizer", "lr")
    points.schedule, points.warmup_steps = _schedule(config.get("training") or {})
    try:
        points.scale = read_scale(facts.run.scale_path)
    except UsageError as error:
        points.problems.append(f"{job}: {error}")
    validations, training = _series(facts.rows, "val", points.metric), _training_losses(facts.rows, points.metric)
    points.steps, points.losses = [step for step, _ in validations], [loss for _, loss in validations]
    try:
        samples = max(points.steps, default=0) * (_at(config, "training", "batch_size") or 0)
        points.epochs = _epochs(config.get("data") or {}, samples)
    except UsageError as error:
        points.problems.append(f"{job}: {error}")
    if metric and not validations and (other := _metrics(facts.rows)):
        points.problems.append(f"{job}: its validations have no {metric}; they have {', '.join(other)}")
    if points.scale is None and validations:
        points.problems.append(f"{job}: no {facts.run.scale_path}: its size is not known")
    points.diverged = how_it_diverged(points.status, validations, training)
    return points


def _config(facts: RunFacts) -> dict[str, Any]:
    try:
        config = yaml.safe_load(facts.config)
    except yaml.YAMLError:  # already said
        return {}
    return config if isinstance(config, dict) else {}


def _at(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _schedule(training: Mapping[str, Any]) -> tuple[str | None, int]:
    """Its kind, and the steps of its warm-up."""
    schedule = training.get("schedule") or {}
    warmup = schedule.get("warmup_steps")
    steps = round((schedule.get("warmup_ratio") or 0) * training.get("steps", 0)) if warmup is None else warmup
    return schedule.get("kind"), steps


def _epochs(data: Mapping[str, Any], samples: int) -> float | None:
    """Of a single set on this machine's disks."""
    location = str(data.get("latents") or data.get("shards"))
    if not samples or data.get("mix") or "://" in location or "{" in location:
        return None
    manifest = find_manifest(Path(location) / "train")
    if manifest is None or manifest.samples == 0:
        return None
    return samples / (manifest.samples * ((data.get("clip") or {}).get("per_video") or 1))


def _series(rows: list[dict[str, Any]], split: str, metric: str) -> list[tuple[int, float]]:
    return [
        (row["step"], row[metric]) for row in rows if row["split"] == split and isinstance(row.get(metric), float | int)
    ]


def _training_losses(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Of the validations' metric where the training has it too: a total loss may rise since a term sets in late."""
    return _series(rows, "train", metric) or _series(rows, "train", "loss")


def _metrics(rows: list[dict[str, Any]]) -> list[str]:
    found = {name: None for row in rows if row["split"] == "val" for name in row}
    return [name for name in found if name not in ("step", "split", "time")]
