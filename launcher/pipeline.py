"""Pipelines: the order of the jobs, the config and fingerprint of each, and what a launch would do with each.

Everything here is known before anything starts, and all that can be wrong with a pipeline file is said then.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher.config import PipelineConfig
from launcher.rundir import changed_keys, fingerprint, is_empty, refuse_foreign
from stpredict.config import apply_overrides, read_yaml, resolve, validate
from stpredict.jobs.config import AnyJobConfig, JobConfig
from stpredict.run import Run

Action = Literal["skip", "run", "continue", "rerun"]


@dataclass(frozen=True)
class Job:
    name: str
    needs: tuple[str, ...]
    config: JobConfig
    fingerprint: str

    @property
    def run(self) -> Run:
        return Run(self.config.run)


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> tuple[PipelineConfig, list[Job]]:
    """The pipeline in ``path`` and its jobs, each after those that it needs."""
    node = read_yaml(path)
    known = list(node.get("jobs") or {})
    for override in overrides:
        match override.partition("=")[0].split("."):
            case ["jobs", name, *_] if name not in known:
                raise UsageError(
                    f"{override}: {path} has no job {name!r}; its jobs: {', '.join(known)} (jobs.JOB.set.KEY=value)"
                )
    node = apply_overrides(node, overrides)
    # A job's ${run:NAME} is kept as it is until the job's own config is resolved.
    data = resolve(node, path, run_of=lambda name: f"${{run:{name}}}")
    pipeline = validate(PipelineConfig, data, path)
    jobs: dict[str, Job] = {}
    for name in _order(pipeline, path):
        needs = pipeline.jobs[name].needs
        config = _job_config(pipeline, path, name)
        jobs[name] = Job(name, needs, config, fingerprint(config, [jobs[need].fingerprint for need in needs]))
    return pipeline, list(jobs.values())


def plan(jobs: Sequence[Job], rerun: Collection[str] = ()) -> dict[str, Action]:
    """What a launch does with each job. UsageError where it would touch the work of another config."""
    if unknown := set(rerun) - {job.name for job in jobs}:
        raise UsageError(f"--rerun {min(unknown)}: no such job; jobs: {', '.join(job.name for job in jobs)}")
    actions: dict[str, Action] = {}
    asked = set(rerun)
    for job in jobs:
        if asked & set(job.needs):
            asked.add(job.name)
        refuse_foreign(job.run.path)
        anew = [need for need in job.needs if actions[need] == "run"]
        if is_empty(job.run):
            actions[job.name] = "run"
        elif job.name in asked:
            actions[job.name] = "rerun"
        elif anew:
            raise UsageError(
                f"job {job.name!r} has work in {job.run.path} that was made from an earlier {anew[0]!r}, which is to "
                f"run anew: add --rerun {job.name}"
            )
        else:
            actions[job.name] = _continue_or_skip(job)
    return actions


def _continue_or_skip(job: Job) -> Action:
    status = job.run.status()
    if status is None or status.fingerprint != job.fingerprint:
        changes = ", ".join(changed_keys(job.run, job.config)) or "made outside this pipeline, or from other runs"
        raise UsageError(
            f"job {job.name!r}: {job.run.path} has another config ({changes}); --rerun {job.name} makes it and what "
            "needs it anew (the old ones are kept), or give another `run`"
        )
    return "skip" if status.state == "done" else "continue"


def _order(pipeline: PipelineConfig, path: Path) -> list[str]:
    for name, job in pipeline.jobs.items():
        for need in job.needs:
            if need not in pipeline.jobs:
                raise UsageError(f"{path}: job {name!r} needs {need!r}, which is not one of {', '.join(pipeline.jobs)}")
    try:
        return list(TopologicalSorter({name: job.needs for name, job in pipeline.jobs.items()}).static_order())
    except CycleError as error:
        raise UsageError(f"{path}: jobs need each other in a circle: {' → '.join(error.args[1][::-1])}") from None


def _job_config(pipeline: PipelineConfig, path: Path, name: str) -> JobConfig:
    job = pipeline.jobs[name]
    file = path.parent / job.config

    def run_of(other: str) -> Path:
        if other not in job.needs:
            raise UsageError(f"{path}: job {name!r} reads ${{run:{other}}} but does not need it: add it to `needs`")
        return pipeline.run / other

    node = OmegaConf.merge(read_yaml(file), OmegaConf.create(job.set), {"run": str(pipeline.run / name)})
    where = f"{path}: job {name!r} ({job.config})"
    config = validate(AnyJobConfig, resolve(node, where, run_of), where)
    if config.home != config.run:
        raise UsageError(f"{where}: `parts` are for jobs submitted by hand; here, set resources.processes")
    return config
