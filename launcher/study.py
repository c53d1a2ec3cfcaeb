"""Studies: a grid of trials, each a few jobs, after jobs that are done once for all of them, and a report at the end.

A study is written as a pipeline: every trial's jobs are jobs of it, called TRIAL-JOB, so that launching, looking after
and resuming are those of any pipeline.
"""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher.config import Axis, PipelineConfig, PipelineJob, StudyConfig
from launcher.pipeline import Job, jobs_of
from stpredict.config import apply_overrides, read_yaml, resolve, validate

REPORT = "report"  # the job that comes after all trials


class Trial(NamedTuple):
    name: str
    at: dict[str, str]  # axis → label
    changes: list[dict[str, Any]]  # of ``trial``, in the order of the axes


def load_study(path: Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, PipelineConfig, list[Job]]:
    """The study in ``path``, the pipeline that it is, and the pipeline's jobs in order."""
    node = read_yaml(path)
    if node.get("kind") != "study":
        raise UsageError(f"{path} has kind {node.get('kind')}: a study has kind study (docs/studies.md)")
    # A job's ${run:NAME} is kept as it is until the job's own config is resolved.
    data = resolve(apply_overrides(node, overrides), path, run_of=lambda name: f"${{run:{name}}}")
    study = validate(StudyConfig, data, path)
    pipeline = as_pipeline(study, path)
    return study, pipeline, jobs_of(pipeline, path)


def as_pipeline(study: StudyConfig, path: Path) -> PipelineConfig:
    """``study`` with every trial's jobs written out."""
    trials = trials_of(study)
    jobs, last = dict(study.jobs), {}
    for number, trial in enumerate(trials):
        before = last[trials[number - study.at_once].name] if study.at_once and number >= study.at_once else ()
        own = _jobs_of_trial(study, trial, path, before)
        jobs |= own
        needed = {need for job in own.values() for need in job.needs}
        last[trial.name] = tuple(name for name in own if name not in needed)
    report = {
        "kind": "study_report",
        "title": study.name,
        "axes": {name: axis.role for name, axis in study.grid.items()},
        "trials": {
            trial.name: {
                "at": trial.at,
                "runs": {job: str(study.run / _name(trial.name, job)) for job in study.trial},
            }
            for trial in trials
        },
        "analysis": study.analysis.model_dump(mode="json"),
    }
    jobs[REPORT] = PipelineJob(after=tuple(name for names in last.values() for name in names), set=report)
    return PipelineConfig(name=study.name, vars=study.vars, run=study.run, jobs=jobs)


def trials_of(study: StudyConfig) -> list[Trial]:
    """Every point of the grid, the last axis fastest."""
    axes = [[(name, label, change) for label, change in _changes(axis, name)] for name, axis in study.grid.items()]
    found = []
    for point in product(*axes):
        at = {name: label for name, label, _ in point}
        name = "-".join(label for _, label, _ in point)
        found.append(Trial(name, at, [change for _, _, change in point]))
    return found


def _changes(axis: Axis, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, changes of ``trial``) for each value of an axis."""
    named = axis.values.items() if isinstance(axis.values, dict) else [(label_of(name, v), v) for v in axis.values]
    return [(label, _nested(axis.key, value) if axis.key else value) for label, value in named]


def label_of(axis: str, value: Any) -> str:
    """What a value of an axis without labels is called: seed0, lr3e-3, block1x1x8."""
    if isinstance(value, list):
        text = "x".join(map(str, value))
    elif isinstance(value, float):
        digits, exponent = f"{value:e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = str(value)
    return axis + re.sub(r"[^\w-]+", "_", text)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _jobs_of_trial(study: StudyConfig, trial: Trial, path: Path, before: tuple[str, ...]) -> dict[str, PipelineJob]:
    written = OmegaConf.create(
        {name: job.model_dump(mode="json", exclude_unset=True) for name, job in study.trial.items()}
    )
    names = {job: _name(trial.name, job) for job in study.trial}
    where = f"{path}: trial {trial.name}"
    data = resolve(
        OmegaConf.merge(written, *trial.changes), where, run_of=lambda name: f"${{run:{names.get(name, name)}}}"
    )
    found = {}
    for name, job in validate(dict[str, PipelineJob], data, where).items():
        needs = tuple(names.get(need, need) for need in job.needs)
        after = tuple(names.get(other, other) for other in job.after)
        first = not set(job.needs) & set(study.trial)
        found[names[name]] = job.model_copy(update={"needs": needs, "after": (*after, *(before if first else ()))})
    return found


def _name(trial: str, job: str) -> str:
    return f"{trial}-{job}"
