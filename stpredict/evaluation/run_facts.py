"""What a page says about one run, whatever state it is in: what cannot be read becomes a line in ``problems``.

Torch-free: only the small files of the run directory are read.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.config import SPLITS
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, read_manifest
from stpredict.evaluation.forecast_scores import ForecastEvaluation, read_forecast_metrics
from stpredict.evaluation.forecasts import ForecastIndex, read_forecast_index
from stpredict.evaluation.generated import Index, read_index
from stpredict.evaluation.quantizer_results import QuantizerAnalysis, read_quantizer_analysis
from stpredict.evaluation.reconstructed import (
    ReconstructedIndex,
    Reconstruction,
    read_metrics,
    read_reconstructed_index,
)
from stpredict.evaluation.results import Evaluation, read_evaluation
from stpredict.run import Run, Status

TRAINING = ("tokenizer", "prior", "forecaster")


@dataclass
class RunFacts:
    name: str
    run: Run
    kind: str = "?"
    state: str = "not started"
    status: Status | None = None
    config: str = ""
    ranks: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    precision: str | None = None  # of a training run
    rows: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl of a training run
    manifests: dict[str, Manifest] = field(default_factory=dict)  # split → what a shard or encode run holds
    index: Index | ReconstructedIndex | ForecastIndex | None = None  # of a generate, reconstruct or forecast run
    evaluation: Evaluation | None = None  # of an evaluate run, or
    reconstruction: Reconstruction | None = None  # or
    forecast: ForecastEvaluation | None = None
    quantizer: QuantizerAnalysis | None = None  # of its forecaster, where that was asked for

    @property
    def wall_s(self) -> float | None:
        """From the last start to the end."""
        if not (self.status and self.status.started and self.status.finished):
            return None
        started, finished = map(datetime.fromisoformat, (self.status.started, self.status.finished))
        return (finished - started).total_seconds()


def read_facts(name: str, path: Path) -> RunFacts:
    facts = RunFacts(name, Run(path))
    _read_status(facts)
    _read_config(facts)
    facts.environment = _read_json(facts, facts.run.environment_path) or {}
    if facts.status is not None:
        _read_work(facts)
    return facts


def _read_status(facts: RunFacts) -> None:
    facts.status = status = _attempt(facts, Run.status, facts.run)
    if status is None:
        if not facts.problems:
            facts.problems.append(f"not run: no status.json in {facts.run.path}")
        return
    facts.kind, facts.state = status.kind, status.state
    match status.state:
        case "failed":
            facts.problems.append(f"failed: {status.error or 'no reason given'} (log: {facts.run.log_path(0)})")
        case "preempted":
            at = f"{status.unit} {status.step}" + (f" of {status.steps}" if status.steps else "")
            facts.problems.append(f"stopped early, and can be continued: {status.error or f'stopped at {at}'}")
        case "pending" | "running" if status.kind != "report":
            of = f" of {status.steps}" if status.steps else ""
            at = f"{status.unit} {status.step}{of}, last heard of {status.heartbeat}"
            facts.problems.append(f"not finished when this page was written ({status.state}: {at})")


def _read_config(facts: RunFacts) -> None:
    try:
        facts.config = facts.run.config_path.read_text()
        resources = (yaml.safe_load(facts.config) or {}).get("resources") or {}
        facts.ranks = resources.get("processes", 1)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        facts.problems.append(f"{facts.run.config_path} is damaged")


def _read_work(facts: RunFacts) -> None:
    run = facts.run
    match facts.kind:
        case "tokenizer" | "prior" | "forecaster":
            _read_training(facts)
        case "shard" | "encode":
            splits = [split for split in SPLITS if (run.path / split / "manifest.json").exists()]
            facts.manifests = {split: m for split in splits if (m := _attempt(facts, read_manifest, run.path / split))}
            if not splits:
                facts.problems.append("no manifest yet")
        case "generate":
            facts.index = _attempt(facts, read_index, run)
        case "reconstruct":
            facts.index = _attempt(facts, read_reconstructed_index, run)
        case "forecast":
            facts.index = _attempt(facts, read_forecast_index, run)
        case "evaluate":
            path = run.path / "metrics.json"
            facts.reconstruction, facts.forecast = read_metrics(path), read_forecast_metrics(path)
            if not facts.reconstruction and not facts.forecast:
                facts.evaluation = _attempt(facts, read_evaluation, path)
            if (path := run.path / "quantizer.json").exists():
                facts.quantizer = _attempt(facts, read_quantizer_analysis, path)


def _read_training(facts: RunFacts) -> None:
    run = facts.run
    facts.rows, damaged = _read_rows(run.metrics_path)
    if damaged:
        facts.problems.append(f"{damaged} lines of {run.metrics_path} are damaged and left out")
    if not facts.rows:
        facts.problems.append(f"no metrics in {run.metrics_path}: no training curves")
    states = sorted(run.checkpoints.glob("step_*/state.json"))
    state = _read_json(facts, states[-1]) if states else None
    if state:
        facts.precision = state.get("precision")


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl that can be read, and how many cannot. The end of a line that is being written, or that
    a kill cut off, is neither."""
    rows, damaged = [], 0
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            damaged += line.endswith("\n")
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "split" in row:
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _attempt(facts: RunFacts, read, what: Run | Path) -> Any:
    try:
        return read(what)
    except UsageError as error:
        facts.problems.append(str(error))
        return None


def _read_json(facts: RunFacts, path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        facts.problems.append(f"{path} is damaged")
        return None
