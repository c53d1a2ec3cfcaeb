"""Kills ranks of a training run at chosen and at random moments, lets the run continue, and compares what it leaves.

``python -m tests.distributed.kills --kills 25`` writes the log of that many (``make prove``). A process imports torch
and DeepSpeed once and forks the ranks of every start, so that a start takes about a second.
"""

import argparse
import copy
import faulthandler
import importlib
import io
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

GRACE_S = 2.0  # what the other ranks have to notice that one is gone, before they are killed too
TIMEOUT_S = 120
STEPS = 10
RANKS = 2
# Every step or every other one is saved, so that random moments fall into saves as well.
TRAINING = {
    "steps": STEPS,
    "batch_size": 8,
    "ema_decay": 0.9,
    "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "schedule": {"kind": "linear", "warmup_steps": 2},
    "log_every": 1,
    "validate_every": 5,
    "picture_every": 5,
}
CONFIGS = {
    "bf16 ZeRO-2, every step, keep 2": {"precision": "bf16", "zero_stage": 2, "checkpoint": {"every": 1, "keep": 2}},
    "fp32 ZeRO-3, every 2 steps, keep 1": {"precision": "fp32", "zero_stage": 3, "checkpoint": {"every": 2, "keep": 1}},
}
# What a rank imports sooner or later, some of it only when DeepSpeed builds its engine.
PRELOADED = (
    "tests.distributed.toy",
    "stpredict.training.logger",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "torch._dynamo",
    "setuptools",
)
VICTIMS = ("rank 0", "rank 1", "all")


@dataclass(frozen=True)
class Point:
    """A place in the product's code: before the ``count``-th call of ``owner``'s ``attribute`` (of those whose first
    path has ``named`` in its name), or ``after`` it, or when ``partly`` has done half of its work. ``everywhere``:
    every rank comes there, else rank 0. ``resuming``: only a start that continues from a checkpoint does."""

    text: str
    owner: str
    attribute: str
    named: str = ""
    count: int = 1
    after: bool = False
    partly: Callable | None = None
    everywhere: bool = False
    resuming: bool = False


def _half_a_file(tensors, path) -> None:
    from safetensors.torch import save

    data = save(tensors)
    Path(path).write_bytes(data[: len(data) // 2])


def _half_a_text(path: Path, text: str) -> None:
    path.with_name(f".{path.name}.0.tmp").write_text(text[: len(text) // 2])


def _one_file_of(folder: Path, ignore_errors: bool = False) -> None:
    next(iter(folder.iterdir())).unlink()


SAVING, CHECKPOINT = "stpredict.training.saving", "stpredict.training.checkpoint"
RESTORING, CHECKPOINTING = "stpredict.training.restoring", "stpredict.training.checkpointing"
TRAINER, EVALUATION = "stpredict.training.engine:Trainer", "stpredict.training.evaluation:Evaluation"
TOY, LOGGER = "tests.distributed.toy", "stpredict.training.logger"
MAIN_RESUMES = {"resuming": True}
RESUMES = {"resuming": True, "everywhere": True}
POINTS = [
    Point("in a step, after the forward", f"{TOY}:ToyTask", "training_step", count=4, after=True, everywhere=True),
    Point("in a step, between the two optimizers", f"{TOY}:ToyTask", "discriminator_step", count=6, everywhere=True),
    Point("half of a rank's file written", SAVING, "save_file", count=2, partly=_half_a_file, everywhere=True),
    Point("the same in the run's first save", SAVING, "save_file", partly=_half_a_file, everywhere=True),
    Point("between a rank's two files", "pathlib:Path", "write_bytes", named="random_0000", count=3, everywhere=True),
    Point("files written, not flushed", SAVING, "flush", named="rank_0000", count=2, everywhere=True),
    Point("between the files and the marker", SAVING, "write_complete", count=2),
    Point("between state and index and the marker", CHECKPOINT, "write_atomically", named="COMPLETE", count=3),
    Point("half of the marker", CHECKPOINT, "write_atomically", named="COMPLETE", count=2, partly=_half_a_text),
    Point("between the marker and latest", CHECKPOINT, "write_atomically", named="latest", count=3),
    Point("between latest and retention", SAVING, "surplus", count=3),
    Point("retention: the marker gone, files there", "shutil", "rmtree", named="step_"),
    Point("retention: half removed", "shutil", "rmtree", named="step_", partly=_one_file_of),
    Point("in a resume, before it looks for a checkpoint", CHECKPOINTING, "newest_sound_checkpoint", **RESUMES),
    Point("in a resume, half of the state set", f"{RESTORING}:CheckpointReader", "fill", count=9, **RESUMES),
    Point("in a resume, half of metrics.jsonl", LOGGER, "write_atomically", partly=_half_a_text, **MAIN_RESUMES),
    Point("in a resume, before its first save's marker", SAVING, "write_complete", **MAIN_RESUMES),
]


@dataclass(frozen=True)
class Kill:
    """Kill ``number``: at ``point``, or where that is None after ``delay`` of the time that training takes."""

    number: int
    config: str
    victim: str
    point: Point | None
    delay: float


def plan(kills: int, seed: int, points: list[Point] = POINTS) -> list[Kill]:
    """The points first, each once, the rest at random moments; configs in turn, victims at random, but that who alone
    comes to a point is killed there."""
    chosen = random.Random(seed)
    found = []
    for number in range(kills):
        point = points[number] if number < len(points) else None
        victim = chosen.choice(VICTIMS if point is None or point.everywhere else ("rank 0", "all"))
        found.append(Kill(number, list(CONFIGS)[number % 2], victim, point, chosen.random()))
    return found


class Nursery:
    """The process that has imported everything and forks the ranks."""

    def __enter__(self) -> "Nursery":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from tests.distributed.kills import serve; serve()"]
        self.process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT_S)

    def start(self, trials: list[dict], out: Path, log: Path, **how: Any) -> dict[str, Any]:
        """Runs ``trials`` of the toy in RANKS processes until all have ended. ``signals`` has each rank's exit status
        (minus the signal), ``training_s`` the time between the first step and the end, ``during`` what a rank was at
        when it was killed from outside.

        ``how``: ``victim`` is killed at ``point`` (a place in POINTS), or ``after_s`` seconds of training; ``fault``,
        a function of tests/distributed/faults.py, is called with the rank before all else.
        """
        log.mkdir(parents=True)
        start = {"trials": trials, "out": str(out), "log": str(log), **how}
        self.process.stdin.write(json.dumps(start) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """The nursery: reads starts, forks their ranks, answers when they are gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        answers.write(json.dumps(_ranks(json.loads(line))) + "\n")
        answers.flush()


def _ranks(start: dict[str, Any]) -> dict[str, Any]:
    log, size = Path(start["log"]), RANKS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            _rank(start, rank, port)
        pids.append(pid)
    (log / "pids").write_text(json.dumps(pids))
    running, status = dict(enumerate(pids)), {}
    began = time.monotonic()
    end, strike_at = began + TIMEOUT_S, None
    training_since, during = None, None
    while running:
        for rank, pid in list(running.items()):
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                del running[rank]
                status[rank] = os.waitstatus_to_exitcode(code)
                if status[rank]:
                    end = min(end, time.monotonic() + GRACE_S)
        at = time.monotonic()
        if training_since is None and (log / "training").exists():
            training_since = at
            strike_at = at + start["after_s"] if "after_s" in start else None
        if strike_at is not None and at >= strike_at:
            strike_at, during = None, [(log / f"at_{rank}").read_text().strip() for rank in range(size)]
            for rank in _of(start["victim"], size):
                if rank in running:
                    os.kill(running[rank], signal.SIGKILL)
        if at > end:
            if not status:  # none has failed, all stand still: where?
                for pid in running.values():
                    os.kill(pid, signal.SIGABRT)
                time.sleep(1)
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    training_s = time.monotonic() - training_since if training_since else None
    return {"signals": [status[rank] for rank in range(size)], "training_s": training_s, "during": during}


def _of(victim: str, size: int) -> list[int]:
    return list(range(size)) if victim == "all" else [int(victim.removeprefix("rank "))]


def _rank(start: dict[str, Any], rank: int, port: int) -> None:
    """A forked rank: as ``python toy.py OUT`` in a process of its own."""
    from launcher.rank import leave
    from tests.distributed import toy

    log = Path(start["log"])
    output = os.open(log / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = io.StringIO(json.dumps(start["trials"]))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)
    faulthandler.enable()
    try:
        _trace(log, rank)
        if fault := start.get("fault"):
            getattr(importlib.import_module("tests.distributed.faults"), fault)(rank)
        if (point := start.get("point")) is not None:
            _arm(POINTS[point], start["victim"], rank, log)
        toy.main(Path(start["out"]))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def _owner(name: str) -> Any:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _arm(point: Point, victim: str, rank: int, log: Path) -> None:
    """Has this rank, where it is the one to do so, kill ``victim`` when it comes to ``point``."""
    striker = 1 if point.everywhere and victim == "rank 1" else 0
    if rank != striker:
        return
    owner, calls = _owner(point.owner), 0
    function = getattr(owner, point.attribute)

    def strikes(*arguments, **options):
        nonlocal calls
        names = [Path(a).name for a in arguments if isinstance(a, str | Path)]
        if point.named in (names[0] if names else ""):
            calls += 1
            if calls == point.count:
                if point.partly:
                    point.partly(*arguments, **options)
                result = function(*arguments, **options) if point.after else None
                _strike(victim, log, point.text)
                if point.after:
                    return result
        return function(*arguments, **options)

    setattr(owner, point.attribute, strikes)


def _strike(victim: str, log: Path, text: str) -> None:
    (log / "struck").write_text(text)
    pids = json.loads((log / "pids").read_text())
    victims = [pids[rank] for rank in _of(victim, len(pids))]
    for pid in sorted(victims, key=lambda pid: pid == os.getpid()):  # itself last
        os.kill(pid, signal.SIGKILL)


def _trace(log: Path, rank: int) -> None:
    """Keeps a note of what this rank is at, and of when it begins to train."""
    at = os.open(log / f"at_{rank}", os.O_RDWR | os.O_CREAT)
    now = {"loop": "start", "thread": ""}

    def note() -> None:
        os.pwrite(at, " + ".join(filter(None, now.values())).ljust(80).encode(), 0)

    def noting(owner: str, attribute: str, what: str, slot: str = "loop") -> None:
        holder = _owner(owner)
        function = getattr(holder, attribute)

        def noted(*arguments, **options):
            before, now[slot] = now[slot], what
            note()
            if attribute == "train":
                (log / "training").touch()
            try:
                return function(*arguments, **options)
            finally:
                now[slot] = before
                note()

        setattr(holder, attribute, noted)

    note()
    noting(TRAINER, "train", "between steps")
    noting("stpredict.training.learner:Learner", "step", "step")
    noting(EVALUATION, "validate", "validation")
    noting(EVALUATION, "picture", "picture")
    noting(f"{SAVING}:Saver", "start", "begin of a save")
    noting(f"{SAVING}:Saver", "finish", "end of a save")
    noting(SAVING, "write_complete", "marker")
    noting(SAVING, "_write", "files being written", "thread")


@dataclass(frozen=True)
class Outcome:
    """What came of a kill: exit statuses, what the next start found and skipped, and how the end differs."""

    kill: Kill
    where: str
    signals: list[int]
    found: str
    skipped: list[str]
    differences: list[str]


def trial(config: str) -> dict[str, Any]:
    training = {**copy.deepcopy(TRAINING), **CONFIGS[config]}
    return {"run": "run", "training": training, "dropout": 0.5, "rich": True}


class Proof:
    """Kills runs under ``folder`` and compares them with uninterrupted ones, made when first needed."""

    def __init__(self, nursery: Nursery, folder: Path):
        self.nursery, self.folder = nursery, folder
        self.references: dict[str, tuple[Path, float]] = {}

    def reference(self, config: str) -> tuple[Path, float]:
        """The uninterrupted run, and the seconds that its training took."""
        if config not in self.references:
            out = self.folder / f"whole_{len(self.references)}"
            ended = self.nursery.start([trial(config)], out, out / "log")
            if any(ended["signals"]):
                raise RuntimeError(last_lines(out / "log"))
            self.references[config] = out / "run", ended["training_s"]
        return self.references[config]

    def run(self, kill: Kill) -> Outcome:
        """Kills, starts again, and compares."""
        whole, seconds = self.reference(kill.config)
        out = self.folder / f"kill_{kill.number}"
        settings = {"victim": kill.victim}
        if kill.point is None:
            settings["after_s"] = kill.delay * seconds
        else:
            settings["point"] = POINTS.index(kill.point)
        if kill.point and kill.point.resuming:  # something to resume: a run killed half-way
            # Its first save is complete: the second one, begun two steps before, waited for that.
            half = POINTS.index(next(p for p in POINTS if p.text == "in a step, between the two optimizers"))
            self.nursery.start([trial(kill.config)], out, out / "log_half", victim="all", point=half)
        ended = self.nursery.start([trial(kill.config)], out, out / "log_killed", **settings)
        while kill.point is None and ended["during"] is None:  # faster than the uninterrupted one, it was over before
            shutil.rmtree(out)
            settings["after_s"] /= 2
            ended = self.nursery.start([trial(kill.config)], out, out / "log_killed", **settings)
        if kill.point:
            struck = out / "log_killed" / "struck"
            where = struck.read_text() if struck.exists() else "never came there"
        else:
            during = "; ".join(f"rank {rank}: {at}" for rank, at in enumerate(ended["during"]))
            where = f"{1000 * settings['after_s']:.0f} ms into training ({during})"
        before = survivors(out / "run")
        again = self.nursery.start([trial(kill.config)], out, out / "log_again")
        log = (out / "log_again" / "rank_0.log").read_text()
        found = re.search(r"continuing from .*/(step_\d+)", log)
        skipped = re.findall(r"/(step_\d+) (?:has|is) [^\n]*: skipped", log)
        differences = [] if kill.point is None or where == kill.point.text else [where]
        if any(again["signals"]):
            differences.append(f"the next start failed: {last_lines(out / 'log_again')}")
        differences += expected_start(before, found.group(1) if found else "", skipped)
        differences += compare(whole, out / "run")
        return Outcome(kill, where, ended["signals"], found.group(1) if found else "", skipped, differences)


def last_lines(log: Path, characters: int = 1500) -> str:
    return "\n".join(path.read_text()[-characters:] for path in sorted(log.glob("rank_*.log")))


def survivors(run: Path) -> list[tuple[str, bool]]:
    """The checkpoints that a kill left, newest first, and whether each has its marker."""
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    return [(folder.name, (folder / "COMPLETE").exists()) for folder in folders]


def expected_start(before: list[tuple[str, bool]], found: str, skipped: list[str]) -> list[str]:
    """A kill damages nothing: the next start finds the newest with a marker, and skips exactly those above it."""
    complete = [name for name, marked in before if marked]
    newest = complete[0] if complete else ""
    above = [name for name, marked in before if not marked and name > newest]
    wrong = [f"found {found or 'nothing'}, not {newest or 'nothing'}"] if found != newest else []
    return wrong + ([f"skipped {skipped}, not {above}"] if skipped != above else [])


def compare(whole: Path, again: Path) -> list[str]:
    """How two finished runs differ in what must be equal: every byte of every checkpoint kept, which are kept,
    ``latest``, and metrics.jsonl but for times."""
    names = [files(run / "checkpoints") for run in (whole, again)]
    differences = [f"files: {', '.join(sorted(names[0] ^ names[1]))}"] if names[0] != names[1] else []
    for name in sorted(names[0] & names[1]):
        if (whole / "checkpoints" / name).read_bytes() != (again / "checkpoints" / name).read_bytes():
            differences.append(f"{name} differs")
    rows = [metrics(run) for run in (whole, again)]
    if rows[0] != rows[1]:
        differences.append("metrics.jsonl differs")
    return differences


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock says."""
    from tests.distributed.toy import repeatable

    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [repeatable(row) for row in rows]


def _row(outcome: Outcome) -> str:
    kill = outcome.kill
    cells = [
        str(kill.number + 1),
        kill.config,
        kill.victim,
        outcome.where,
        " ".join(map(str, outcome.signals)),
        outcome.found or "nothing: from scratch",
        ", ".join(outcome.skipped) or "none",
        "; ".join(outcome.differences) or "equal",
    ]
    return f"| {' | '.join(cells)} |"


def _machine() -> str:
    from stpredict.run import _cpu

    return f"{os.cpu_count()} cores of {_cpu() or platform.processor()}, Python {platform.python_version()}"


@contextmanager
def proof(folder: Path):
    with Nursery() as nursery:
        yield Proof(nursery, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="also written there")
    options = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    folder, outcomes = Path(tempfile.mkdtemp(prefix="kills_")), []
    with proof(folder) as proven:
        for kill in plan(options.kills, options.seed):
            outcomes.append(proven.run(kill))
            print(_row(outcomes[-1]), flush=True)
    bad = sum(bool(outcome.differences) for outcome in outcomes)
    about = (
        f"`make prove` (`python -m tests.distributed.kills --kills {options.kills} --seed {options.seed}`), "
        f"{date.today()}, {_machine()}, torch {version('torch')}, DeepSpeed {version('deepspeed')}, load average "
        f"{load:.1f} before; {time.monotonic() - began:.0f} s.",
        f"{RANKS} ranks train the toy of tests/distributed/toy.py (buffers, a frozen layer, EMA, a discriminator, "
        f"dropout 0.5) for {STEPS} steps; SIGKILL; the other ranks have {GRACE_S:.0f} s to notice; then the run is "
        "started again. Equal: every byte of every checkpoint kept (weights, moments, averages, buffers, random "
        "states, position in the data), which ones are kept, `latest`, and metrics.jsonl but for times, against a run "
        "that nobody interrupted.",
        f"**{len(outcomes) - bad} of {len(outcomes)} equal.**",
    )
    head = (
        "# Killed ranks\n\n"
        + "".join(textwrap.fill(paragraph, 120, break_on_hyphens=False) + "\n\n" for paragraph in about)
        + "| kill | config | killed | when | exit statuses | next start found | it skipped | end |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    text = head + "".join(f"{_row(outcome)}\n" for outcome in outcomes)
    if options.log:
        options.log.write_text(text)
    print(f"{len(outcomes) - bad} of {len(outcomes)} equal")
    if bad:
        print(f"what they left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
