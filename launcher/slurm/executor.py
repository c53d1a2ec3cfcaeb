"""The SLURM executor: submits all jobs of a launch at once through submitit, with SLURM's own dependencies. Nothing of
ours stays alive on the login node; what each job does when it starts or fails is in ``task`` and ``after``."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import submitit
from rich.console import Console
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from data_pipeline.errors import UsageError, UserError
from launcher.config import JobKind, SlurmCluster
from launcher.launch import Launch
from launcher.pipeline import Job
from launcher.record import Submitted
from launcher.slurm import queue
from launcher.slurm.failure import failures_path
from launcher.slurm.script import parameters, python_of
from launcher.slurm.task import work

console = Console(highlight=False, markup=False, soft_wrap=True)


class SlurmExecutor:
    """Submits; returns 0 as soon as SLURM has all jobs. They are submitted held, and released together: should one be
    refused, the others are taken back before any has started."""

    def __init__(self, cluster: SlurmCluster):
        self.cluster = cluster

    def check(self) -> None:
        missing = [tool for tool in ("sbatch", "srun", "squeue", "scancel", "scontrol") if shutil.which(tool) is None]
        if missing:
            raise UsageError(
                f"no SLURM on this machine (not found: {', '.join(missing)}); use a login node of the cluster"
            )

    def run(self, launch: Launch) -> int:
        new: list[str] = []
        try:
            for job in launch.jobs:
                if launch.actions[job.name] not in ("skip", "queued"):
                    self._submit_job(job, launch, new)
            if new:
                queue.release(new)
        except BaseException:
            queue.cancel(new)
            raise
        for job in launch.jobs:
            ids = ", ".join(sorted({s.slurm_id.partition("_")[0] for s in launch.record.jobs[job.name].submitted}))
            what = {"skip": "up to date", "queued": f"queued already: {ids}"}.get(launch.actions[job.name])
            console.print(f"{job.name}: {what or f'submitted: {ids}'}")
        if new:
            console.print(f"how far they are: stpredict status {launch.run.path}")
        return 0

    def scripts(self, launch: Launch) -> dict[str, str]:
        found = {}
        for job in launch.jobs:
            if launch.actions[job.name] in ("skip", "queued"):
                continue
            needs = [f"{need}'s" for need in job.needs if launch.actions[need] != "skip"]
            if job.array:
                found[f"{job.name} (array of {len(job.missing_parts())})"] = self._script(
                    job, launch, job.config.kind, needs
                )
                found[f"{job.name}.merge"] = self._script(job, launch, "merge", [f"{job.name}'s"])
            else:
                found[job.name] = self._script(job, launch, job.config.kind, needs)
        return found

    def _script(self, job: Job, launch: Launch, kind: JobKind, needs: list[str]) -> str:
        executor = self._executor(job, launch, kind, job.missing_parts(), needs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _submit_job(self, job: Job, launch: Launch, new: list[str]) -> None:
        """Submits a job; an array's tasks and its merge. Adds what SLURM called them to ``new`` and to the record."""
        record = launch.record.jobs[job.name]
        needed = [last_id(launch, need) for need in job.needs if launch.actions[need] != "skip"]
        record.submitted = []
        if not job.array:
            self._submit(job, launch, job.config.kind, [None], needed, new)
            return
        if missing := job.missing_parts():
            needed = self._submit(job, launch, job.config.kind, missing, needed, new)
        self._submit(job, launch, "merge", [None], needed, new)

    def _submit(
        self, job: Job, launch: Launch, kind: JobKind, parts: list[int | None], needed: list[str], new: list[str]
    ) -> list[str]:
        name = f"{job.name}.merge" if kind == "merge" else job.name
        executor = self._executor(job, launch, kind, parts, needed)
        with _refusals(name), _outside_slurm(), executor.batch():
            submitted = [
                executor.submit(work, str(launch.run.path.absolute()), job.name, part, kind == "merge")
                for part in parts
            ]
        ids = [one.job_id for one in submitted]
        for id in ids:  # another SLURM, or one that began to count anew, may have had a job of that id here
            failures_path(launch.run.slurm_folder(name), id).unlink(missing_ok=True)
        new += sorted({id.partition("_")[0] for id in ids})
        launch.record.jobs[job.name].submitted += [
            Submitted(slurm_id=id, part=part, merge=kind == "merge") for id, part in zip(ids, parts, strict=True)
        ]
        launch.run.write_record(launch.record)
        return ids

    def _executor(
        self, job: Job, launch: Launch, kind: JobKind, parts: list[int | None], needed: list[str]
    ) -> submitit.SlurmExecutor:
        name = f"{job.name}.merge" if kind == "merge" else job.name
        after = [str(launch.run.path.absolute()), job.name]
        if kind == "merge":
            after.append("--merge")
        elif job.array:
            after.append(f"--parts={','.join(map(str, parts))}")
        folder = launch.run.slurm_folder(name).absolute()
        executor = submitit.SlurmExecutor(folder=folder, python=python_of(self.cluster))
        config = None if kind == "merge" else job.config
        needed = sorted({id.partition("_")[0] for id in needed})
        executor.update_parameters(
            **parameters(self.cluster, kind, f"{launch.record.pipeline}.{name}", config, launch.code, after, needed)
        )
        return executor


def last_id(launch: Launch, job: str) -> str:
    """The SLURM job whose good end is that of ``job``."""
    return launch.record.jobs[job].submitted[-1].slurm_id


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What sbatch says against a job, in one line."""
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if "error:" in line]
        raise UserError(f"job {name!r}: SLURM refuses it: {'; '.join(said) or error}; nothing was submitted") from None


@contextmanager
def _outside_slurm() -> Iterator[None]:
    """A submission from inside a SLURM job inherits nothing of it, but for where SLURM is."""
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
