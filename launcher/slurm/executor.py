"""The SLURM executor: submits all jobs of a launch at once through submitit, with SLURM's own dependencies. Nothing of
ours stays alive on the login node; what each job does when it starts or fails is in ``task`` and ``after``."""

import io
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from pathlib import Path
from shlex import quote

import submitit
from rich.console import Console
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from data_pipeline.errors import UsageError, UserError
from launcher.changes import interruptible, uninterrupted
from launcher.config import JobKind, SlurmCluster
from launcher.launch import Launch
from launcher.pipeline import Job
from launcher.record import Submitted
from launcher.slurm import queue
from launcher.slurm.failure import failures_path
from launcher.slurm.limits import limits, refusal
from launcher.slurm.script import parameters, python_of
from launcher.slurm.task import work

console = Console(highlight=False, markup=False, soft_wrap=True)


class SlurmExecutor:
    """Submits; returns 0 as soon as SLURM has all jobs. They are submitted held, and released together: should anything
    go wrong before, they are cancelled, and none has started."""

    def __init__(self, cluster: SlurmCluster):
        self.cluster = cluster

    def check(self) -> None:
        tools = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if missing:
            raise UsageError(
                f"no SLURM on this machine (not found: {', '.join(missing)}); use a login node of the cluster"
            )

    def run(self, launch: Launch) -> int:
        self.check_jobs(launch)
        known = set(launch.before.slurm_ids()) if launch.before else set()
        new: list[str] = []
        with interruptible(), suppress(KeyboardInterrupt), ExitStack() as last, _taken_back(launch, new, known):
            queue.cancel(queue.strays(launch.run.slurm, known))
            for job in launch.to_do:
                self._submit_job(job, launch, new)
            last.enter_context(uninterrupted())  # from here on it is too late for a change of mind
            with launch.committed():
                queue.release(new)
        new_names = {job.name for job in launch.to_do}
        for job in launch.jobs:
            ids = ", ".join(sorted({s.slurm_id.partition("_")[0] for s in launch.record.jobs[job.name].submitted}))
            what = {"skip": "up to date", "queued": f"queued already: {ids}"}.get(launch.actions[job.name])
            console.print(f"{job.name}: {what or f'submitted: {ids}'}")
            if "queued" in (what or "") and (later := [name for name in job.after if name in new_names]):
                console.print(f"{job.name}: does not wait for {', '.join(later)}: launch again when all have ended")
        if new:
            console.print(f"how far they are: stpredict status {quote(str(launch.run.path))}")
        return 0

    def scripts(self, launch: Launch) -> dict[str, str]:
        """As they would be submitted, but that the ids of jobs that are not submitted yet are their names."""
        found = {}
        for job in launch.to_do:
            dependencies = self._dependencies(job, launch, new=lambda name: f"<id of {name}>")
            for kind, parts in _steps(job, launch):
                name = _name(job, kind)
                executor = self._executor(job, launch, kind, dependencies)
                found[name] = _text(executor, len(parts))
                dependencies = [f"afterok:<id of {name}>"]
        return found

    def check_jobs(self, launch: Launch) -> None:
        """UsageError where SLURM has nothing on which one of the jobs could run, or refuses what one asks for."""
        if not launch.to_do:
            return
        if "%" in str(launch.run.path.absolute()):
            raise UsageError(f"{launch.run.path}: SLURM takes % in a log's path for a pattern; give another `run`")
        there = limits()
        for job in launch.to_do:
            for kind, parts in _steps(job, launch):
                executor = self._executor(job, launch, kind, [])
                with outside_slurm():
                    why = refusal(executor.parameters, _text(executor, len(parts)), there)
                if why:
                    raise UsageError(f"job {_name(job, kind)!r}: {why}; nothing is submitted")

    def _dependencies(self, job: Job, launch: Launch, new: Callable[[str], str] | None = None) -> list[str]:
        """What sbatch is to wait for: the good end of the jobs that ``job`` needs, any end of those that it comes
        after."""
        ended = [*job.after, *launch.turn_after(job)]
        ids = {"afterok": self._last(job.needs, launch, new), "afterany": self._last(ended, launch, new)}
        return [":".join((how, *those)) for how, those in ids.items() if those]

    def _last(self, names: Sequence[str], launch: Launch, new: Callable[[str], str] | None) -> list[str]:
        """The SLURM jobs whose end is that of those of the jobs ``names`` that are not done."""
        found = []
        for name in names:
            if launch.actions[name] == "skip":
                continue
            other = next(other for other in launch.jobs if other.name == name)
            if new and launch.actions[name] != "queued":
                found.append(new(_name(other, _steps(other, launch)[-1][0])))
            else:
                found.append(launch.record.jobs[name].submitted[-1].slurm_id.partition("_")[0])
        return found

    def _submit_job(self, job: Job, launch: Launch, new: list[str]) -> None:
        """Submits a job; an array's tasks and its merge. Adds what SLURM called them to ``new`` and to the record."""
        record = launch.record.jobs[job.name]
        dependencies = self._dependencies(job, launch)
        record.submitted.clear()
        for kind, parts in _steps(job, launch):
            executor = self._executor(job, launch, kind, dependencies)
            where = str(launch.run.path.absolute())
            with refusals(_name(job, kind)), outside_slurm(), uninterrupted(), executor.batch():
                submitted = [executor.submit(work, where, job.name, part, kind == "merge") for part in parts]
            ids = [one.job_id for one in submitted]
            for id in ids:  # another SLURM, or one that began to count anew, may have had a job of that id here
                failures_path(launch.run.slurm_folder(_name(job, kind)), id).unlink(missing_ok=True)
            arrays = sorted({id.partition("_")[0] for id in ids})
            new += arrays
            dependencies = [":".join(("afterok", *arrays))]
            record.submitted += [
                Submitted(slurm_id=id, part=part, merge=kind == "merge") for id, part in zip(ids, parts, strict=True)
            ]

    def _executor(self, job: Job, launch: Launch, kind: JobKind, terms: Sequence[str]) -> submitit.SlurmExecutor:
        name = _name(job, kind)
        after = [str(launch.run.path.absolute()), job.name]
        folder = launch.run.slurm_folder(name).absolute()
        executor = _Submitit(folder=folder, python=python_of(self.cluster))
        config = None if kind == "merge" else job.config
        executor.update_parameters(
            **parameters(self.cluster, kind, launch.record.slurm_name(name), config, launch.code, after, terms)
        )
        return executor


class _Submitit(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 1  # a dry run needs no SLURM


def _steps(job: Job, launch: Launch) -> list[tuple[JobKind, list[int | None]]]:
    """What a job is in SLURM: one job or, of an array, its missing parts, if there are, and the merge."""
    if not job.array:
        return [(job.config.kind, [None])]
    missing = launch.missing_parts(job)
    return [*([(job.config.kind, missing)] if missing else []), ("merge", [None])]


def _name(job: Job, kind: JobKind) -> str:
    return f"{job.name}.merge" if kind == "merge" else job.name


def _text(executor: submitit.SlurmExecutor, parts: int) -> str:
    """The batch script as submitit writes it for so many tasks."""
    array = {"map_count": parts} if parts > 1 else {}
    return _make_sbatch_string(executor._submitit_command_str, executor.folder, **executor.parameters, **array)


@contextmanager
def _taken_back(launch: Launch, new: list[str], known: Collection[str]) -> Iterator[None]:
    """Where the block fails, the jobs ``new``, and those whose ids never arrived here, are cancelled, and their scripts
    removed."""
    folders = [launch.run.slurm_folder(_name(job, kind)) for job in launch.to_do for kind, _ in _steps(job, launch)]
    before = {path for folder in (launch.run.slurm, *folders) for path in (folder, *folder.glob("*")) if path.exists()}
    try:
        yield
    except BaseException as error:
        with uninterrupted():
            left = _cancel(launch, new, known)
            if not left:
                _remove_new(folders, before)
        if left:
            raise UserError(f"{error or 'interrupted'}; {left}") from None
        if isinstance(error, KeyboardInterrupt):
            raise UserError("interrupted; nothing was submitted") from None
        if isinstance(error, UserError):
            raise type(error)(f"{error}; nothing was submitted") from None
        raise


def _remove_new(folders: Sequence[Path], before: Collection[Path]) -> None:
    for folder in folders:
        for path in set(folder.glob("*")) - set(before):
            path.unlink(missing_ok=True)
    for folder in (*folders, folders[0].parent):
        if folder not in before and folder.exists():
            folder.rmdir()


def _cancel(launch: Launch, new: Collection[str], known: Collection[str]) -> str | None:
    """Cancels what was submitted; what to say of what could not be."""
    left = list(new)
    try:
        queue.cancel(left)
        left = []
        left = queue.strays(launch.run.slurm, {*known, *new})
        queue.cancel(left)
    except UserError as error:
        if not left:
            return f"whether SLURM has jobs of it left is not known ({error}): squeue --me"
        return f"could not be cancelled ({error}): SLURM jobs {', '.join(left)}; do it by: scancel {' '.join(left)}"
    return None


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """What sbatch says against a job, in one line."""
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints there what it raises
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if "error:" in line]
        raise UserError(f"job {name!r}: SLURM refuses it: {'; '.join(said) or error}") from None


@contextmanager
def outside_slurm() -> Iterator[None]:
    """A submission from inside a SLURM job inherits nothing of it, but for where SLURM is."""
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
