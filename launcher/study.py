"""Studies: a grid of trials, each a few jobs, after jobs that are done once for all of them, and a report at the end.

A study is written as a pipeline: every trial's jobs are jobs of it, called TRIAL-JOB, so that launching, looking after
and resuming are those of any pipeline. A trial is called after its labels, wherever it stands in the
grid: one that grows leaves the runs of its earlier trials as they are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher.config import PipelineConfig, PipelineJob, StudyConfig
from launcher.grid import Trial, shape, trials_of
from launcher.overrides import refuse_new
from launcher.pipeline import Job, jobs_of
from stpredict.config import apply_overrides, flat, read_yaml, resolve, validate

REPORT = "report"  # the job that comes after all trials


class Study(NamedTuple):
    """A study, the pipeline that it is, and the pipeline's jobs in order."""

    config: StudyConfig
    pipeline: PipelineConfig
    jobs: list[Job]

    @property
    def trials(self) -> list[str]:
        return list(dict.fromkeys(job.trial for job in self.jobs if job.trial))


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in ``path``. UsageError says all that can be known to be wrong with it before anything starts."""
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder; give a study's YAML (a study's run: `stpredict resume {path}` goes on with it, "
            f"`stpredict report {path}` writes its report anew)"
        )
    node = read_yaml(path)
    if (kind := node.get("kind")) != "study":
        other = f"use `stpredict launch {path}`" if kind else "a study has `kind: study` (docs/studies.md)"
        raise UsageError(f"{path} has kind {kind}: {other}")
    refuse_new(node, overrides, path)
    # A job's ${run:NAME} is kept as it is until the job's own config is resolved.
    data = resolve(apply_overrides(node, overrides), path, run_of=lambda name: f"${{run:{name}}}")
    study = validate(StudyConfig, data, path)
    _check_jobs(study, path)
    trials = trials_of(study, path)
    pipeline = _as_pipeline(study, trials, path)
    jobs = jobs_of(pipeline, path)
    _refuse_equal(trials, jobs, path)
    return Study(study, pipeline, jobs)


def headline(study: Study) -> str:
    """``nbp_sizes: 5 size x 2 seed = 10 trials, 2 at once``."""
    at_once = f", {study.config.at_once} at once" if study.config.at_once else ""
    return f"{study.config.name}: {shape(study.config, len(study.trials))}{at_once}"


def _as_pipeline(study: StudyConfig, trials: Sequence[Trial], path: Path) -> PipelineConfig:
    """``study`` with every trial's jobs written out."""
    jobs, last = dict(study.jobs), []
    for trial in trials:
        own = _jobs_of_trial(study, trial, path)
        if clash := next((name for name in own if name in jobs), None):
            raise UsageError(f"{path}: two jobs are called {clash!r}, one of trial {trial.name}; give it another label")
        jobs |= own
        needed = {need for job in own.values() for need in job.needs}
        last += [name for name in own if name not in needed]
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
    jobs[REPORT] = PipelineJob(after=tuple(last), set=report)
    return PipelineConfig(name=study.name, vars=study.vars, run=study.run, at_once=study.at_once, jobs=jobs)


def _jobs_of_trial(study: StudyConfig, trial: Trial, path: Path) -> dict[str, PipelineJob]:
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
        found[names[name]] = job.model_copy(update={"needs": needs, "after": after, "trial": trial.name})
    return found


def _name(trial: str, job: str) -> str:
    return f"{trial}-{job}"


def _check_jobs(study: StudyConfig, path: Path) -> None:
    """UsageError where jobs are called like others, or wait for some that are not there."""
    if both := next((name for name in study.trial if name in study.jobs), None):
        raise UsageError(f"{path}: {both!r} is in `jobs`, done once, and in `trial`, done for each; rename one")
    for where, jobs in (("jobs", study.jobs), ("trial", study.trial)):
        if REPORT in jobs:
            raise UsageError(f"{path}: {where}.{REPORT}: a study's last job is called so; give it another name")
        known = {**study.jobs, **(study.trial if where == "trial" else {})}
        for name, job in jobs.items():
            if job.trial:
                raise UsageError(f"{path}: {where}.{name}.trial: a study sets it itself; remove it")
            for key, others in (("needs", job.needs), ("after", job.after)):
                if unknown := next((other for other in others if other not in known), None):
                    of = "a job of `jobs`" if where == "jobs" else "one of `trial` or `jobs`"
                    raise UsageError(f"{path}: {where}.{name}.{key}: {unknown!r} is not {of}: {', '.join(known)}")


def _refuse_equal(trials: Sequence[Trial], jobs: Sequence[Job], path: Path) -> None:
    """UsageError where two trials would be the same run."""
    of_trial: dict[str, list[str]] = {trial.name: [] for trial in trials}
    for job in jobs:
        if job.trial:
            config = {**job.config.model_dump(mode="json"), "run": "", "array": job.array}
            own = f"{job.run.path.parent / job.trial}-"
            of_trial[job.trial].append(f"{job.role} {sorted(flat(config).items())}".replace(own, "TRIAL-"))
    points = {trial.name: trial.at for trial in trials}
    seen: dict[str, str] = {}
    for name, texts in of_trial.items():
        first = seen.setdefault("\n".join(sorted(texts)), name)
        if first != name:
            axes = [f"grid.{axis}" for axis, label in points[name].items() if label != points[first][axis]]
            raise UsageError(
                f"{path}: trials {first} and {name} would be the same run: between them {' and '.join(axes)} changes "
                "nothing; remove one of the values, or mend `key`"
            )
