"""Pipelines: the order of the jobs, the config and fingerprint of each, and what a launch would do with each.

Everything here is known before anything starts, and all that can be wrong with a pipeline file is said then.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from shlex import quote
from typing import Literal

import yaml
from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher.config import PipelineConfig, PipelineJob
from launcher.overrides import refuse_new
from launcher.parts import WRITTEN, part_runs
from launcher.record import PipelineRun, part_config
from launcher.rundir import changed_keys, changed_since, fingerprint, is_empty, refuse_foreign
from stpredict.config import apply_overrides, flat, load, read_yaml, resolve, validate
from stpredict.jobs.config import AnyJobConfig, JobConfig, PartedJobConfig
from stpredict.jobs.start import MODULES
from stpredict.run import Run

MOST_NAMED = 20  # jobs of a pipeline that an error names all of
Action = Literal["skip", "run", "continue", "rerun", "queued"]


@dataclass(frozen=True)
class Job:
    name: str
    needs: tuple[str, ...]
    config: JobConfig
    fingerprint: str
    array: int | None = None
    after: tuple[str, ...] = ()
    trial: str | None = None

    @property
    def run(self) -> Run:
        return Run(self.config.run)

    @property
    def role(self) -> str:
        """What it is called in its trial, which all trials have a job of; its name where it is of none."""
        return self.name.removeprefix(f"{self.trial}-")

    @property
    def parts(self) -> list[PartedJobConfig]:
        """The configs of an array's tasks; none where it is no array."""
        return [part_config(self.config, part, self.array) for part in range(self.array or 0)]

    def missing_parts(self) -> list[int]:
        """The parts that are not done with this config."""
        return [config.part for config in self.parts if not _is_done(Run(config.home), self.fingerprint)]


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> tuple[PipelineConfig, list[Job]]:
    """The pipeline in ``path`` and its jobs, each after those that it needs. One job's config is a pipeline of that
    job: its ``run`` is the pipeline's, and KIND in it the job's."""
    node = read_yaml(path)
    if node.get("kind") == "study":
        raise UsageError(f"{path} is a study: use `stpredict study {path}`")
    if node.get("kind") in MODULES:
        pipeline = _alone(path, overrides)
        return pipeline, jobs_of(pipeline, path)
    refuse_new(node, overrides, path)
    node = apply_overrides(node, overrides)
    # A job's ${run:NAME} is kept as it is until the job's own config is resolved.
    data = resolve(node, path, run_of=lambda name: f"${{run:{name}}}")
    pipeline = validate(PipelineConfig, data, path)
    return pipeline, jobs_of(pipeline, path)


def _alone(path: Path, overrides: Sequence[str]) -> PipelineConfig:
    config = load(AnyJobConfig, path, overrides)
    changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    array = None
    if isinstance(config, PartedJobConfig) and config.parts > 1:
        array = config.parts
        changes |= {"part": 0, "parts": 1}
    job = PipelineJob(config=Path(path.name), set=changes, array=array)
    return PipelineConfig(name=path.stem, run=config.run, jobs={config.kind: job})


def jobs_of(pipeline: PipelineConfig, path: Path) -> list[Job]:
    """In the order of their needs."""
    jobs: dict[str, Job] = {}
    for name in _order(pipeline, path):
        job = pipeline.jobs[name]
        config = _job_config(pipeline, path, name)
        upstream = [jobs[need].fingerprint for need in job.needs]
        array = None if job.array == 1 else job.array
        jobs[name] = Job(name, job.needs, config, fingerprint(config, upstream), array, job.after, job.trial)
    return list(jobs.values())


def plan(
    jobs: Sequence[Job], rerun: Collection[str] = (), queued: Mapping[str, str] | None = None
) -> dict[str, Action]:
    """What a launch does with each job. UsageError where it would touch the work of another config.

    ``rerun`` are names of jobs, of trials, or of a job that each trial has. ``queued`` are the jobs that SLURM is to do
    already, with their fingerprints.
    """
    queued = queued or {}
    asked = _meant(rerun, jobs)
    if rerun and queued:
        run = quote(str(jobs[0].run.path.parent))
        raise UsageError(f"--rerun: {', '.join(queued)} queued or running; first: stpredict cancel {run}")
    actions: dict[str, Action] = {}
    for job in jobs:
        if asked & set(job.needs):
            asked.add(job.name)
        refuse_foreign(job.run.path, known=WRITTEN if job.array or part_runs(job.run.path) else ())
        if job.name in queued:
            if queued[job.name] != job.fingerprint:
                before = PipelineRun(job.run.path.parent).config_path(job.name)
                changes = ", ".join(changed_since(before, job.config)) or "another one of what it needs"
                raise UsageError(
                    f"job {job.name!r} is queued or running with another config ({changes}); first: "
                    f"stpredict cancel {quote(str(job.run.path.parent))}"
                )
            actions[job.name] = "queued"
            continue
        anew = [need for need in job.needs if actions[need] == "run"]
        page_alone = job.config.repeatable and job.run.status() is None  # `stpredict report` was there first
        if is_empty(job.run) or page_alone:
            actions[job.name] = "run"
        elif job.name in asked:
            actions[job.name] = "rerun"
        elif anew:
            raise UsageError(
                f"job {job.name!r} has work in {job.run.path} that was made from an earlier {anew[0]!r}, which is to "
                f"run anew: add --rerun {job.name}"
            )
        else:
            follows_work = any(actions[other] != "skip" for other in (*job.needs, *job.after))
            actions[job.name] = _continue_or_skip(job, follows_work or _is_stale(job))
    return actions


def _meant(names: Collection[str], jobs: Sequence[Job]) -> set[str]:
    """The jobs called ``names``, those of the trials called so, and those that are called so in every trial."""
    found = set()
    for name in names:
        meant = {job.name for job in jobs if name in (job.name, job.trial, job.role)}
        if not meant:
            known = [name for job in jobs for name in (job.name, job.trial, job.role) if name]
            near = difflib.get_close_matches(name, known, n=3) if len(jobs) > MOST_NAMED else dict.fromkeys(known)
            of = f"did you mean {' or '.join(near)}?" if len(jobs) > MOST_NAMED and near else f"jobs: {', '.join(near)}"
            raise UsageError(f"--rerun {name}: no such job; {of}")
        found |= meant
    return found


def _is_stale(job: Job) -> bool:
    """Whether a job that is ``repeatable`` is to be done again: what it is about has become other or newer since."""
    status = job.run.status()
    if not job.config.repeatable or status is None:
        return False
    old = flat(yaml.safe_load(job.run.config_path.read_text()))
    finished = status.finished or ""
    runs = [Run(job.run.path.parent / other) for other in job.after]
    newer = any((other := run.status()) is not None and (other.finished or "") > finished for run in runs)
    return newer or old != flat(job.config.model_dump(mode="json"))


def _continue_or_skip(job: Job, follows_work: bool) -> Action:
    status = job.run.status()
    begun = [run for run in part_runs(job.run.path) if run.status()] if status is None else [job.run]
    other = next((run for run in begun if run.status().fingerprint != job.fingerprint), None)
    if status is None and (
        foreign := next((run for run in begun if not run.path.name.endswith(f"-of-{job.array}")), None)
    ):
        of = foreign.path.name.rpartition("-")[2]
        raise UsageError(
            f"job {job.name!r}: {job.run.path} was begun by {of} tasks; finish it with `array: {of}`, or --rerun "
            f"{job.name} makes it and what needs it anew"
        )
    if not begun or other:
        run = other or job.run
        changed = changed_keys(run, job.config, but=() if run is job.run else ("part", "parts"))
        changes = ", ".join(changed) or "made outside this pipeline, or from other runs"
        raise UsageError(
            f"job {job.name!r}: {job.run.path} has another config ({changes}); --rerun {job.name} makes it and what "
            "needs it anew (the old ones are kept), or give another `run`"
        )
    done = status is not None and status.state == "done"
    return "skip" if done and not (job.config.repeatable and follows_work) else "continue"


def _is_done(run: Run, fingerprint: str) -> bool:
    status = run.status()
    return status is not None and (status.state, status.fingerprint) == ("done", fingerprint)


def _order(pipeline: PipelineConfig, path: Path) -> list[str]:
    for name, job in pipeline.jobs.items():
        for verb, others in (("needs", job.needs), ("comes after", job.after)):
            if unknown := next((other for other in others if other not in pipeline.jobs), None):
                raise UsageError(
                    f"{path}: job {name!r} {verb} {unknown!r}, which is not one of {', '.join(pipeline.jobs)}"
                )
    before = {name: (*job.needs, *job.after) for name, job in pipeline.jobs.items()}
    try:
        return list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise UsageError(f"{path}: jobs wait for each other in a circle: {' → '.join(error.args[1][::-1])}") from None


def _job_config(pipeline: PipelineConfig, path: Path, name: str) -> JobConfig:
    job = pipeline.jobs[name]
    file = path.parent / job.config if job.config else None
    if file and not file.is_file():
        raise UsageError(f"{path}: job {name!r}: {file}: no such config file (paths are relative to the pipeline file)")

    def run_of(other: str) -> Path:
        if other not in job.needs:
            raise UsageError(f"{path}: job {name!r} reads ${{run:{other}}} but does not need it: add it to `needs`")
        return pipeline.run / other

    base = read_yaml(file) if file else OmegaConf.create()
    node = OmegaConf.merge(base, OmegaConf.create(job.set), {"run": str(pipeline.run / name)})
    where = f"{path}: job {name!r}" + (f" ({job.config})" if file else "")
    config = validate(AnyJobConfig, resolve(node, where, run_of), where)
    if config.home != config.run:
        raise UsageError(f"{where}: `parts` are for jobs submitted by hand; here, set jobs.{name}.array")
    if job.array and not isinstance(config, PartedJobConfig):
        raise UsageError(f"{where}: `array` is for jobs that write shards (shard, encode), not for {config.kind}")
    return config
