"""A job on this machine: N processes, joined by torch.distributed's environment.

The launcher prepares the run directory, starts the ranks, shows the progress that rank 0 writes to status.json and
sees to it that all ranks end together: when one fails, when the launcher is asked to stop, and when it is killed.
A job that runs is a generator: who goes on with it now and then, until it returns, may have several.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from data_pipeline.errors import UsageError, UserError
from launcher.parts import whole_is_done
from launcher.progress import Watch
from launcher.rundir import is_done, locked, prepare, put_back, refuse_foreign
from launcher.snapshot import environment_for
from stpredict.jobs.config import JobConfig, TrainingJobConfig
from stpredict.run import Run, now

PREEMPTED = 75
GRACE_FAILED_S = 15.0  # ranks that lost a peer cannot save together any more
GRACE_PREEMPTED_S = 60.0  # ranks that are about to finish the same save
KILLED_S = 10.0  # until one that was killed is gone
POLL_S = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

console = Console(stderr=True)
_given_ports: set[int] = set()
Command = Callable[[Run], list[str]]
T = TypeVar("T")
Running = Generator[None, None, T]  # yields whenever there is nothing to do but to wait


def rank_command(run: Run) -> list[str]:
    return [sys.executable, "-m", "launcher.rank", str(run.config_path), str(os.getpid())]


def run_job(
    config: JobConfig,
    name: str | None = None,
    print_of: str | None = None,
    threads: int | None = None,
    command: Command = rank_command,
    code: Path | None = None,
) -> int:
    """Runs ``config`` to its end and returns its exit status: see ``running``."""
    return to_the_end(running(config, name, print_of, threads, command=command, code=code))


def to_the_end(job: Running[T]) -> T:
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value
        time.sleep(POLL_S)


def running(
    config: JobConfig,
    name: str | None = None,
    print_of: str | None = None,
    threads: int | None = None,
    gpus: Sequence[str] | None = None,
    stops: list[int] | None = None,
    bars: Progress | None = None,
    command: Command = rank_command,
    code: Path | None = None,
) -> Running[int]:
    """``config`` while it runs; what it returns is its exit status. ``print_of`` is its fingerprint in a pipeline,
    ``code`` the copy of the packages that its ranks import (default: these here).

    ``gpus`` are those that its ranks may use (default: all); ``stops`` the stop signals that the process has received
    so far (default: it looks after them itself); ``bars`` are where it shows its own beside those of other jobs.

    Raises UsageError when the run directory is in use or holds the work of another config.
    """
    run, name = Run(config.home), name or config.kind
    if whole_is_done(config):
        say(f"{name}: already done and merged; remove {config.run} to do it again")
        return 0
    refuse_foreign(run.path)
    with locked(run.path) as lock, stop_signals() if stops is None else nullcontext(stops) as stops:
        if is_done(run, config):
            more = ", or train on with more training.steps and --force" if isinstance(config, TrainingJobConfig) else ""
            say(f"{name}: already done; remove {run.path} to do it again{more}")
            return 0
        config.check_ranks(config.resources.processes)
        before = prepare(run, config, print_of)
        for error in run.logs.glob("rank_*.error"):  # of an earlier start, perhaps with more ranks
            error.unlink()
        threads = config.resources.threads or threads
        seen = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with _last_word(run):
            ranks = start_ranks(
                command(run), config.resources.processes, run.log_path, threads, code, [lock.fileno()], seen
            )
            with Watch(run, name, console, bars) as watch:
                ended = yield from supervised(ranks, stops, watch.show, name)
        code = _conclude(run, name, ended)
        if code == UsageError.exit_status:
            put_back(run, before)
    if code == 0 and config.kind == "shard":
        from stpredict.jobs.shard import left_out

        if line := left_out(config):
            say(f"{name}: {line}", style="yellow")
    return code


def start_ranks(
    command: Sequence[str],
    processes: int,
    log_of: Callable[[int], Path],
    threads: int | None = None,
    code: Path | None = None,
    keep_open: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """Starts the ranks, each in a session of its own: a terminal's Ctrl-C is for the launcher alone. ``log_of`` a rank
    is the file that gets its output; ``keep_open`` are files that live as long as any rank."""
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(threads or max(1, len(os.sched_getaffinity(0)) // processes)),
        "PYTHONUNBUFFERED": "1",
        **(environment_for(code) if code else {}),
        **(variables or {}),
    }
    ranks = []
    try:
        for rank in range(processes):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(_start_rank(command, environment, log_of(rank), f"rank {rank} of {processes}", keep_open))
    except BaseException:
        _kill_groups(ranks)  # which would wait for those that could not be started
        raise
    return ranks


def _start_rank(
    command: Sequence[str], environment: Mapping[str, str], path: Path, who: str, keep_open: Sequence[int]
) -> subprocess.Popen:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"=== {now()} {who}: {' '.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )


def supervise(ranks: Sequence[subprocess.Popen], stops: list[int], show: Callable[[], None]) -> dict[int, int]:
    """Waits for all ranks: see ``supervised``."""
    return to_the_end(supervised(ranks, stops, show))


def supervised(
    ranks: Sequence[subprocess.Popen], stops: list[int], show: Callable[[], None], name: str = "the job"
) -> Running[dict[int, int]]:
    """Returns, when all ranks have ended, rank → exit status, in the order in which they ended.

    A rank that ends with anything but 0 takes the others with it: SIGTERM, and SIGKILL after a grace. ``stops`` are
    the stop signals received meanwhile: SIGUSR2 is passed on, others as SIGTERM; ranks save and end with 75, and under
    SLURM SIGUSR2 has the job requeued. A second Ctrl-C kills.
    """
    ended: dict[int, int] = {}
    told, deadline = False, None
    try:
        while len(ended) < len(ranks):
            codes = {rank: code for rank, process in enumerate(ranks) if (code := process.poll()) is not None}
            for rank in sorted(codes.keys() - ended.keys(), key=codes.get):  # a death by signal explains other errors
                killed = codes[rank] in (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGKILL)
                asked = killed and (stops or PREEMPTED in ended.values())
                ended[rank] = PREEMPTED if asked else codes[rank]
            bad = [code for code in ended.values() if code != 0]
            if not told and (bad or stops):
                told = True
                if stops:
                    say(f"stopping: {name} saves its state and ends; Ctrl-C again kills it")
                _signal(ranks, signal.SIGUSR2 if signal.SIGUSR2 in stops else signal.SIGTERM)
            if bad and deadline is None:
                deadline = time.monotonic() + (GRACE_PREEMPTED_S if bad[0] == PREEMPTED else GRACE_FAILED_S)
            if stops.count(signal.SIGINT) > 1 or (deadline and time.monotonic() > deadline):
                _kill_groups(ranks)
            show()
            yield
    finally:
        _kill_groups(ranks)  # what a rank left behind, such as its data workers: they hold the lock of the directory
        for process in ranks:  # after an error of ours there are some that had not ended
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)
    return ended


def exit_status(codes: Collection[int]) -> int:
    """One exit status for all ranks."""
    if set(codes) <= {0}:
        return 0
    if set(codes) <= {0, PREEMPTED}:
        return PREEMPTED
    return 2 if 2 in codes else 1


@contextmanager
def _last_word(run: Run) -> Iterator[None]:
    """Where not the ranks end the job but an error of ours, which ends them: status.json says so, as they cannot."""
    try:
        yield
    except GeneratorExit:  # the error was another job's, or the loop's
        _leave_status(run, "preempted", "ended with the launcher; run again to continue")
        raise
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _leave_status(run, "failed", f"error of the launcher: {what}")
        raise


def _leave_status(run: Run, state: str, error: str) -> None:
    with suppress(OSError, UserError):  # a full disk, or a damaged status, may be the reason itself
        if run.status().state != "done":
            run.update_status(state=state, finished=now(), error=error)


def _conclude(run: Run, name: str, ended: dict[int, int]) -> int:
    """Leaves status.json saying how the job ended, and says the same in a line if it did not end well."""
    code, status = exit_status(ended.values()), run.status()
    if code == 0 and status.state == "done":
        return 0
    failed = [rank for rank, code in ended.items() if code not in (0, PREEMPTED)]
    first = run.first_error(failed)
    if code != 0 and status.state == "done" and first is None:
        rank, how = next((rank, _describe(code)) for rank, code in ended.items() if code)
        say(f"warning: {name}: done, but rank {rank} {how} afterwards (log: {run.log_path(rank)})", style="yellow")
        return 0
    if code == PREEMPTED:
        run.update_status(state="preempted", finished=now())
        say(f"{name}: {status.error or 'stopped; run again to continue'}")
        return PREEMPTED
    culprit = failed[0] if failed else 0
    if first and ended[culprit] > 0:  # a death by signal explains the errors of the others, which saw it as one
        culprit, error = first
    else:
        error = f"rank {culprit} {_describe(ended[culprit])}; {_last_line(run.log_path(culprit))}"
    log = run.log_path(culprit)
    run.update_status(state="failed", finished=now(), error=error)
    say(f"error: {name}: {error} (log: {log})", style="red")
    return code or 1


def _describe(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL: out of memory?)"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with status {code}" if code else "ended without finishing the job"


def _last_line(log: Path) -> str:
    with log.open(errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=1)
    return f"last in its log: {lines[0]}" if lines and not lines[0].startswith("===") else "its log is empty"


def _signal(ranks: Iterable[subprocess.Popen], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _kill_groups(ranks: Iterable[subprocess.Popen]) -> None:
    for process in ranks:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The stop signals received so far, in place of their usual effect."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    """One that nobody has, nor a job that was just started here and has not come so far."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def say(line: str, style: str | None = None) -> None:
    """A line on standard error, above bars."""
    console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)
