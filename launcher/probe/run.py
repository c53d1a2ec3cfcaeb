"""`stpredict doctor --cluster C`: starts a short job on C's nodes as pipelines start theirs, waits for it, and says
what was found. All that it writes is in a folder of its own, one for each time, on the file system of the runs."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import submitit
from rich.console import Console

from data_pipeline.errors import UsageError, UserError
from launcher import local
from launcher.config import ClusterConfig, SlurmCluster
from launcher.doctor import Finding, exit_status, slurm
from launcher.doctor import show as show_findings
from launcher.probe.facts import DOING, RankFacts, read_facts
from launcher.probe.findings import Expected, judge
from launcher.probe.rank import probe
from launcher.slurm import queue
from launcher.slurm.executor import SlurmExecutor, outside_slurm, refusals
from launcher.slurm.script import parameters, python_of, shape_of
from launcher.snapshot import snapshot
from stpredict.jobs.config import JobConfig, Resources
from stpredict.run import write_atomically

KIND = "prior"  # the nodes are those that such a job would get
RESULT = "doctor.json"
POLL_S = 1.0
LIMIT = "00:20:00"
RUNNING_S = 900.0  # from its start; most of it for compiling DeepSpeed's ops, once
WHY_PENDING = {
    "PartitionDown": "the partition is down: sinfo",
    "PartitionInactive": "the partition is down: sinfo",
    "Priority": "others are before it; --timeout waits longer",
    "Resources": "the nodes are busy; --timeout waits longer",
    "ReqNodeNotAvail": "nodes it needs are down or reserved: sinfo -R",
    "PartitionTimeLimit": "the partition takes no job that long",
    "PartitionNodeLimit": "the partition has not so many nodes",
    "AssocGrpGRES": "the account has used its GPUs up",
    "QOSMaxGRESPerUser": "the qos gives one person fewer GPUs at once",
    "BadConstraints": "no node has what the profile asks for: sinfo -o '%P %N %G %c %m %f'",
}

console = Console(stderr=True, highlight=False)


def examine(
    cluster: ClusterConfig, name: str, nodes: int, processes: int | None, folder: Path, timeout_s: float, as_json: bool
) -> int:
    """Prints the findings about ``nodes`` of the cluster and returns an exit status. UserError where no job could be
    started."""
    if isinstance(cluster, SlurmCluster):
        SlurmExecutor(cluster).check()
        try:
            slurm()
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        expected = _expected(cluster, nodes, processes)
        folder = _new_folder(folder)
        note = _on_slurm(cluster, expected, folder, timeout_s)
        found = [*judge(expected, read_facts(folder)), *_slurm_findings(cluster, folder)]
    else:
        if nodes != 1:
            raise UsageError(f"--nodes {nodes}: cluster {name!r} is this machine, one node")
        ranks = processes or min(2, len(os.sched_getaffinity(0)))
        expected = Expected(nodes=1, ranks=ranks, gpus=0, slurm=False, signal_delay_s=0)
        folder = _new_folder(folder)
        note = _here(expected, cluster.threads, folder)
        found = judge(expected, read_facts(folder))
    if note:
        found.append(Finding("job", "failed", note, f"its logs: {folder}"))
    answer = {
        "cluster": name,
        "folder": str(folder),
        "findings": [finding._asdict() for finding in found],
        "ranks": [facts.model_dump(exclude={"packages"}) for facts in read_facts(folder)],
    }
    write_atomically(folder / RESULT, json.dumps(answer, indent=1) + "\n")
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        show_findings(found)
        print(folder / RESULT)
    return exit_status(found)


def _new_folder(parent: Path) -> Path:
    folder = parent / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} is there already: another one began in this second; try again") from None
    return folder.absolute()


def _expected(cluster: SlurmCluster, nodes: int, processes: int | None) -> Expected:
    options = cluster.options_of(KIND)
    ranks = processes or nodes * (options.ranks_per_node or options.gpus_per_node or 1)
    per_node = shape_of(cluster, KIND, _job(nodes, ranks), "doctor").ranks_per_node
    gpus = min(options.gpus_per_node, per_node)
    return Expected(nodes=nodes, ranks=ranks, gpus=gpus, slurm=True, signal_delay_s=cluster.signal_delay_s)


def _job(nodes: int, ranks: int) -> JobConfig:
    """What it asks for as if it were a job of a pipeline. (Its run directory is not one.)"""
    return JobConfig(run=Path(), resources=Resources(processes=ranks, nodes=nodes, time=LIMIT))


def _on_slurm(cluster: SlurmCluster, expected: Expected, folder: Path, timeout_s: float) -> str | None:
    """Submits the job and waits for its end. Returns what went wrong with it as a whole."""
    executor = _executor(cluster, expected, folder)
    with refusals("doctor"), outside_slurm():
        job = executor.submit(probe, str(folder)).job_id
    try:
        with _interrupted_by_sigterm():
            return _wait(job, expected, folder, timeout_s)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; SLURM job {job} is cancelled") from None
    finally:
        with suppress(UserError):  # that SLURM has forgotten it already
            queue.cancel([job])


def _executor(cluster: SlurmCluster, expected: Expected, folder: Path) -> submitit.SlurmExecutor:
    job, code = _job(expected.nodes, expected.ranks), snapshot(folder / "code")
    # The warning comes when it is asked for, not by the clock; and nothing is to become of the job when it fails.
    given = parameters(cluster.model_copy(update={"signal_delay_s": 1}), KIND, "doctor", job, code, [])
    del given["teardown"]
    more = {name: value for name, value in given["additional_parameters"].items() if name not in ("requeue", "hold")}
    given["additional_parameters"] = {**more, "no-requeue": True}
    answer = shlex.quote(str(folder / "batch_scontrol"))
    given["setup"] = [*given["setup"], f'scontrol --oneliner show job "$SLURM_JOB_ID" >{answer} 2>&1']
    executor = submitit.SlurmExecutor(folder=folder / "slurm", python=python_of(cluster))
    executor.update_parameters(**given)
    return executor


def _wait(job: str, expected: Expected, folder: Path, timeout_s: float) -> str | None:
    began, started, warned = time.monotonic(), None, False
    with _progress(f"SLURM job {job}: submitted") as show:
        while known := queue.queued([job]).get(job):
            waited = time.monotonic() - began
            if known.state == "PENDING":
                if waited > timeout_s:
                    raise UserError(_not_started(job, known.reason, timeout_s))
                show(f"SLURM job {job}: waits for nodes ({known.reason})", f", {waited:.0f} s")
            else:
                started = started or time.monotonic()
                ranks = read_facts(folder)
                show(f"SLURM job {job} on {known.nodes}: {_doing(ranks, expected)}")
                if not warned and _all_at_signal(ranks, expected):
                    warned = True
                    queue.warn(job)
                if time.monotonic() - started > RUNNING_S:
                    return f"no end {RUNNING_S:.0f} s after its start: {_doing(ranks, expected)}"
            time.sleep(POLL_S)
    ranks = read_facts(folder)
    if len(ranks) == expected.ranks and all(facts.stage == "done" for facts in ranks):
        return None
    return f"SLURM job {job} ended early; {_last_words(folder / 'slurm')}"


def _not_started(job: str, reason: str, timeout_s: float) -> str:
    what = WHY_PENDING.get(reason.strip("()").split(",")[0].split(":")[0], f"scontrol show job {job} says more")
    return f"SLURM job {job} did not start in {timeout_s:g} s and is cancelled: {reason.strip('()')} ({what})"


def _here(expected: Expected, threads: int | None, folder: Path) -> str | None:
    command = [sys.executable, "-m", "launcher.probe.rank", str(folder), str(os.getpid())]
    logs, code = folder / "logs", snapshot(folder / "code")
    ranks = local.start_ranks(command, expected.ranks, lambda rank: logs / f"rank_{rank}.log", threads, code)
    warned = False

    def show_and_warn() -> None:
        nonlocal warned
        found = read_facts(folder)
        show(_doing(found, expected))
        if not warned and _all_at_signal(found, expected):
            warned = True
            for process in ranks:
                process.send_signal(signal.SIGUSR2)

    with local.stop_signals() as stops, _progress("starting") as show:
        ended = local.supervise(ranks, stops, show_and_warn)
    if stops:
        raise UserError("interrupted")
    return None if not any(ended.values()) else _last_words(logs)


@contextmanager
def _progress(first: str) -> Iterator[Callable[..., None]]:
    """Shows what is being done: in one line of a terminal, with how long it takes; elsewhere a line for each step."""
    last = first

    def show(doing: str, more: str = "") -> None:
        nonlocal last
        status.update(doing + more)
        if doing != last and not console.is_terminal:
            console.print(doing, soft_wrap=True, markup=False)
        last = doing

    with console.status(first) as status:
        yield show


def _doing(ranks: list[RankFacts], expected: Expected) -> str:
    if not ranks:
        return "starting"
    last = min(ranks, key=lambda facts: list(DOING).index(facts.stage))
    return f"{DOING[last.stage]} ({len(ranks)} of {expected.ranks} ranks are there)"


def _all_at_signal(ranks: list[RankFacts], expected: Expected) -> bool:
    return len(ranks) == expected.ranks and all(facts.stage == "signal" for facts in ranks)


def _last_words(folder: Path) -> str:
    """The last line among the logs that looks like an error, rather not srun's, which only says that there was one."""
    logs = [*sorted(folder.glob("*.err")), *sorted(folder.glob("*.log"))]
    lines = [(path.name, line) for path in logs for line in path.read_text(errors="replace").splitlines()]
    errors = [(name, line) for name, line in lines if "rror" in line]
    told = [(name, line) for name, line in errors if not line.startswith("srun:")] or errors or lines
    return ": ".join(told[-1]) if told else "its logs are empty"


def _slurm_findings(cluster: SlurmCluster, folder: Path) -> Iterator[Finding]:
    """What is asked of SLURM itself, not of the ranks."""
    batch = folder / "batch_scontrol"
    if batch.exists() and "JobId=" not in batch.read_text():
        yield Finding(
            "requeueing", "failed", f"scontrol does not work in batch scripts: {' '.join(batch.read_text().split())}",
            "nothing then starts a preempted or failed job again: ask whoever runs the cluster",
        )  # fmt: skip
    partition = cluster.options_of(KIND).partition
    if partition and (about := queue.partition(partition)) and about.get("PreemptMode", "OFF") != "OFF":
        grace, delay = int(about.get("GraceTime", 0)), cluster.signal_delay_s
        detail = f"jobs of {partition} are preempted ({about['PreemptMode']}) with {grace} s to save"
        short = grace < delay
        advice = (
            f"less than signal_delay_s ({delay}): short training.checkpoint.every limits what is lost" if short else ""
        )
        yield Finding("preemption", "warning" if short else "ok", detail, advice)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: Callable | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
