"""Taking a run directory: one launcher at a time, and never two different configs in one place."""

import fcntl
import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from data_pipeline.disk import is_temporary
from data_pipeline.errors import UsageError, UserError
from stpredict.config import as_yaml, differences, flat
from stpredict.jobs.config import FORCE, JobConfig, TrainingJobConfig
from stpredict.run import Run, now, slurm_start

ORPHANS_END_S = 15.0  # data workers notice within seconds that their rank is gone
STARTS_END_S = 180.0  # SLURM kills what is left of a start; of a lost node, a file server frees the locks
OWNER = re.compile(r"process (?P<pid>\d+) on (?P<host>\S+)(?: \(SLURM job (?P<start>\d+\.\d+)\))?")
# What a start leaves behind before the job itself has made anything.
OF_THE_START = {"config.yaml", "status.json", "environment.json", "logs", ".lock"}


def fingerprint(config: JobConfig, upstream: Sequence[str] = ()) -> str:
    """Hash of everything that a job's result depends on: its config and the fingerprints of the runs it reads."""
    keys = config.decisive(flat(config.model_dump(mode="json")))
    return hashlib.sha256(repr((sorted(keys.items()), sorted(upstream))).encode()).hexdigest()


def changed_keys(run: Run, config: JobConfig, but: Collection[str] = ()) -> list[str]:
    """``key: old → new`` for each key, ``but`` those given and those that are harmless, in which ``config`` differs
    from the one that ``run`` was made with."""
    return changed_since(run.config_path, config, but)


def changed_since(file: Path, config: JobConfig, but: Collection[str] = ()) -> list[str]:
    """The same for the config in ``file``; nothing where there is none."""
    try:
        old = flat(yaml.safe_load(file.read_text()))
    except FileNotFoundError:
        return []
    new = flat(config.model_dump(mode="json"))
    old, new = ({key: v for key, v in config.decisive(values).items() if key not in but} for values in (old, new))
    return differences(old, new)


def refuse_foreign(folder: Path, marker: str = "config.yaml", known: Collection[str] = ()) -> None:
    """UsageError if ``folder`` holds a person's own files: anything that no start leaves behind and that is not
    ``known``, without the ``marker`` that every run of ours has. Asked before anything is written there."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give another `run`")
    try:
        config = yaml.safe_load((folder / marker).read_text())
    except FileNotFoundError:
        ours = _entries(folder) <= {*OF_THE_START, *known}
    except (yaml.YAMLError, UnicodeDecodeError):
        ours = False
    else:
        ours = isinstance(config, dict) and {"kind", "run"} <= config.keys()
    if not ours:
        raise UsageError(f"{folder} is not empty and not a run directory; give another `run`, or move it away")


def is_empty(run: Run) -> bool:
    """Nothing was made there yet: such a run may start over with another config."""
    status = run.status()
    return _entries(run.path) <= OF_THE_START and (status is None or status.state != "done")


def is_done(run: Run, config: JobConfig) -> bool:
    """Whether ``run`` is finished with ``config``. UsageError if it holds the work, finished or not, of another one,
    or is no run directory at all."""
    refuse_foreign(run.path)
    if is_empty(run):
        return False
    if changes := changed_keys(run, config):
        if os.environ.get(FORCE):
            return False
        forced = ", or --force to continue with the new one" if isinstance(config, TrainingJobConfig) else ""
        raise UsageError(
            f"{run.path} was made with another config ({', '.join(changes)}); give another `run`, "
            f"or remove that directory{forced}"
        )
    status = run.status()
    return status is not None and status.state == "done" and not config.repeatable


def put_back(run: Run, before: str | None) -> None:
    """What ``prepare`` returned is the run's config again: the one that replaced it has been refused."""
    if before is not None:
        run.write_config(before)


def prepare(run: Run, config: JobConfig, print_of: str | None = None) -> str | None:
    """Writes what stands in a run directory before its ranks start. Returns the config that was there."""
    before = run.config_path.read_text() if run.config_path.is_file() else None
    status = run.status()
    goes_on = not is_empty(run) and not changed_keys(run, config)  # otherwise an earlier fingerprint is another job's
    run.write_config(as_yaml(config))
    run.update_status(
        kind=config.kind,
        state="pending",
        fingerprint=print_of or (goes_on and status and status.fingerprint) or fingerprint(config),
        started=now(),
        finished=None,
        error=None,
        note=None,
        continued_from=None,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    return before


def _lock(file: IO[str], folder: Path) -> None:
    """Takes the lock. Waits for one who holds it, but is about to end."""
    began, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            wait_s = _ends_in_s(owner)
            if time.monotonic() >= began + wait_s:
                raise
            if wait_s > ORPHANS_END_S and not told:
                print(
                    f"{folder}: waiting up to {wait_s:g} s for an earlier start of this job, {owner}", file=sys.stderr
                )
                told = True
            time.sleep(0.2)


def _ends_in_s(owner: str) -> float:
    """After how many seconds the lock whose file says ``owner`` will be free; 0 if that is not known."""
    match = OWNER.fullmatch(owner)
    if match is None:
        return 0.0
    if earlier_start(match["start"]):
        return STARTS_END_S
    # A launcher that is dead, or this process, which asks for the lock: what it started there is about to end.
    alive = match["pid"] != str(os.getpid()) and (
        Path(f"/proc/{match['pid']}").exists() or not Path("/proc/self").exists()
    )
    return ORPHANS_END_S if match["host"] == socket.gethostname() and not alive else 0.0


def earlier_start(start: str | None) -> bool:
    """Whether ``start`` (see ``slurm_start``) is one of this SLURM job before this one: SLURM has ended it."""
    mine = slurm_start(os.environ)
    if not start or not mine:
        return False
    (job, number), (my_job, my_number) = start.split("."), mine.split(".")
    return job == my_job and int(number) < int(my_number)


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Holds the lock of a run directory. Ranks inherit the open file, and so the lock: should the launcher be killed,
    nobody else takes the directory before its last rank has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            _lock(file, folder)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if _ends_in_s(owner) == STARTS_END_S:
                raise UserError(
                    f"{folder}: an earlier start of this job, {owner}, holds it after {STARTS_END_S:g} s: SLURM "
                    "has lost that node but its processes go on, or the file server keeps their lock"
                ) from None
            raise UsageError(f"{folder} is in use by {owner}; wait for it, or give another `run`") from None
        except OSError as error:
            raise UserError(
                f"{folder}: its file system has no file locks ({error.strerror}), without which two jobs could write "
                "there at once; give a `run` on another one"
            ) from None
        file.truncate(0)
        start = slurm_start(os.environ)
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f' (SLURM job {start})' if start else ''}\n")
        file.flush()
        yield file


def owner(folder: Path) -> str | None:
    """Who holds the lock of a run directory, "process PID on HOST"; None where nobody does."""
    try:
        with (folder / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:  # no lock file, or no locks on this file system
        return None
    return None


def _entries(folder: Path) -> set[str]:
    """Names in ``folder``, without what a killed process was about to rename."""
    return {entry.name for entry in folder.iterdir() if not is_temporary(entry)} if folder.exists() else set()
