"""A training in which nothing moves any more ends by itself, and says which rank is to blame.

Every rank marks where it is. A thread of it publishes that in torch.distributed's store, and reads where the others
are. When no rank has moved for a while, each writes the stacks of its threads into its log, names the culprits and
ends; the launcher, or srun, ends those that cannot: a process that is stopped, or C code that keeps the interpreter.
"""

import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from stpredict.run import Run, node_name, now
from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)
# Where Python stands while a rank waits for others.
WAITING = ("/torch/distributed/", "/torch/autograd/", "/deepspeed/")
_numbers = itertools.count()


@dataclass
class Place:
    """Where a rank is, as it publishes it. All ranks make the same marks, so that their number tells who is behind."""

    host: str
    marks: int = 0
    step: int = 0
    phase: str = ""
    moves: int = 0  # marks, and whatever else shows that it works
    where: str = ""  # the innermost line of Python
    waits: bool = False  # that line waits for other ranks
    beat: int = 0  # times published


@dataclass
class Heard:
    """What is known of another rank, and since when (monotonic seconds) it has published nothing new."""

    place: Place | None = None
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches from its making to ``stop()``; never, where ``timeout_s`` is None."""

    def __init__(self, run: Run, ranks: Ranks, timeout_s: float | None):
        self.run, self.ranks, self.timeout_s = run, ranks, timeout_s
        self._marked = (0, 0, "starting")
        self._ticks = 0
        self._still_s = 0.0
        self._host = node_name()
        self._heard = [Heard() for _ in range(ranks.size)]
        self._exchanged = time.monotonic()
        self._stopped = threading.Event()
        self._prefix = f"stpredict/watchdog/{next(_numbers)}/"  # the same on every rank
        if timeout_s is None:
            return
        run.logs.mkdir(parents=True, exist_ok=True)
        # Where torchrun or srun started the ranks, standard error is not the log.
        self._stacks = run.log_path(ranks.rank).open("a")
        self.period_s = min(30.0, timeout_s / 20)
        for work in (self._watch, self._exchange) if ranks.size > 1 else (self._watch,):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def mark(self, step: int, phase: str) -> None:
        """This rank is at ``phase`` of ``step``. Every rank makes the same marks in the same order."""
        self._marked = (self._marked[0] + 1, step, phase)

    def tick(self) -> None:
        """This rank is where it was, but works."""
        self._ticks += 1

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        """Counts the time in which nothing moved; what this process slept through itself (a suspended job) does not
        count."""
        seen, at = None, time.monotonic()
        while not self._stopped.wait(self.period_s / 2):
            self._arm()
            before, at = at, time.monotonic()
            self._still_s += min(at - before, self.period_s)
            moves = (self._marked[0], self._ticks)
            if moves != seen:
                seen, self._still_s = moves, 0.0
            if self._still_s > self.timeout_s:
                self._end()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _arm(self) -> None:
        """Where C code keeps the interpreter, so that this thread cannot run, the stacks are written all the same."""
        faulthandler.dump_traceback_later(self.timeout_s + self.period_s, exit=self.ranks.size == 1, file=self._stacks)

    def _exchange(self) -> None:
        """Publishes and reads, each period, over a connection of its own. It may block: the store is rank 0's."""
        store, beat = None, 0
        keys = [f"{self._prefix}{rank}" for rank in range(self.ranks.size)]
        while True:
            beat += 1
            try:
                store = store or _connected(self.timeout_s)
                store.set(keys[self.ranks.rank], json.dumps(asdict(self._place(beat))))
                there = [rank for rank, key in enumerate(keys) if self._heard[rank].place or store.check([key])]
                for rank, text in zip(there, store.multi_get([keys[rank] for rank in there]), strict=True):
                    self._hear(rank, Place(**json.loads(text)))
            except RuntimeError:  # rank 0 has ended: what follows from it is said elsewhere
                store = None
            else:
                self._exchanged = time.monotonic()
            if self._stopped.wait(self.period_s):
                return

    def _hear(self, rank: int, place: Place) -> None:
        heard = self._heard[rank]
        if heard.place is None or place.beat != heard.place.beat:
            if heard.place is None or place.moves != heard.place.moves:
                self._still_s = 0.0  # while one of them works the others may wait for it
            self._heard[rank] = Heard(place)

    def _place(self, beat: int) -> Place:
        marks, step, phase = self._marked
        where, waits = _innermost()
        return Place(self._host, marks, step, phase, marks + self._ticks, where, waits, beat)

    def _end(self) -> None:
        # Nothing below may keep this process: a file system that has died may be why nothing moves.
        anyhow = threading.Timer(6 * self.period_s, os._exit, (1,))
        anyhow.daemon = True
        anyhow.start()
        try:
            self._say_why()
        finally:
            os._exit(1)

    def _say_why(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._heard[self.ranks.rank] = Heard(self._place(0))
        culprits = self._culprits()
        place = self._heard[culprits[0]].place
        node = place.host if place and len(culprits) < self.ranks.size else None
        line = f"nothing has moved for {self.timeout_s:g} s (training.guards.hang_timeout_s): {self._named(culprits)}"
        log.error("%s\nThis rank is at %s. Its threads:", line, _told(self._heard[self.ranks.rank].place))
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        blamed = self.ranks.rank in culprits
        if blamed:  # its own word is the first
            self.run.write_error(self.ranks.rank, line, node=node)
        time.sleep(3 * self.period_s)  # until all have come here: when one ends, the others lose their peer
        if not blamed:
            self.run.write_error(self.ranks.rank, line, node=node)
        if self.ranks.is_main:
            self.run.update_status(state="failed", finished=now(), error=line)

    def _culprits(self) -> list[int]:
        """Ranks that have fallen silent; where there are none, those whose places give them away."""
        at = time.monotonic()
        if self.ranks.size > 1 and at - self._exchanged > self.timeout_s / 2:
            return [0]  # its process holds the store
        silent = [rank for rank, heard in enumerate(self._heard) if at - heard.since > self.timeout_s / 2]
        return silent or culprits([heard.place for heard in self._heard])

    def _named(self, ranks: list[int]) -> str:
        if len(ranks) == self.ranks.size > 1:
            return f"all ranks are at {_told(self._heard[0].place)}; their stacks are in their logs"
        told = []
        for rank in ranks[:4]:
            heard = self._heard[rank]
            silent_s = time.monotonic() - heard.since
            if heard.place is None:
                told.append(f"rank {rank} has never begun")
            elif silent_s > self.timeout_s / 2:
                told.append(
                    f"rank {rank} on {heard.place.host} has been silent for {silent_s:.0f} s (it is stopped, or in C "
                    f"code that keeps the interpreter), last heard of at {_told(heard.place)}"
                )
            else:
                told.append(f"rank {rank} on {heard.place.host} is at {_told(heard.place)}; its stack is in its log")
        return "; ".join(told) + (f"; and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def culprits(places: list[Place]) -> list[int]:
    """Of the ranks that are behind, which may be all, those that do not wait for another; all of them where they all
    do."""
    least = min(place.marks for place in places)
    behind = [rank for rank, place in enumerate(places) if place.marks == least]
    return [rank for rank in behind if not places[rank].waits] or behind


def _told(place: Place) -> str:
    return f"step {place.step}, {place.phase}, in {place.where}"


def _innermost() -> tuple[str, bool]:
    """The line of Python at which the main thread is, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return "nothing", False
    code = frame.f_code
    waits = any(part in code.co_filename for part in WAITING)
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})", waits


def _connected(timeout_s: float) -> dist.TCPStore:
    """The store in which the ranks found each other."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=max(1.0, timeout_s / 2)),
    )
