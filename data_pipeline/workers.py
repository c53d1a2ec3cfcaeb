"""A DataLoader whose stuck and dead workers are replaced.

Video decoders are C code: on a bad file one may crash, which takes its worker with it, or never return, which no
signal handler in the worker could end. So each worker writes on a board in shared memory what it is at and since when.
When the next item does not come, the main process reads the board, quarantines the sample that a dead or overdue worker
was at, and starts the workers anew behind the last item that it received. Nothing is lost or moved by that, because
the stream can be entered anywhere; the quarantined sample is replaced like one that raises an error.
"""

import ctypes
import logging
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.errors import UserError
from data_pipeline.slots import Slots, Stored

log = logging.getLogger(__name__)

POLL_S = 1.0  # how often the board is read while the main process waits
ORPHANS_LOOK_S = 5.0  # how often a worker looks whether its main process still lives
MOST_TOGETHER = 8  # items to a message, which must be one write to a pipe; fewer messages take less processor time
MOST_RESTARTS = 5  # in a row, without an item in between

#: A sample, and anything small to be said about it.
Item = tuple[dict[str, Any], Any]
#: ``at(what, sample)`` wraps a piece of work: ``sample`` says whether ``what`` is a sample, which can be quarantined.
At = Callable[..., AbstractContextManager[None]]
#: ``read(worker, workers, received, at)`` yields a worker's items; ``received`` of all workers' were taken before.
Read = Callable[[int, int, int, At], Iterator[Item]]


class _Entry(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_int64),
        ("since", ctypes.c_double),  # time.monotonic(), which all processes share; 0 between two pieces of work
        ("sample", ctypes.c_bool),
        ("told", ctypes.c_bool),
        ("what", ctypes.c_char * 1024),
    )


class _Board:
    """What each worker is at. Every worker writes its own entry; only the main process reads."""

    def __init__(self, workers: int):
        self._entries = multiprocessing.RawArray(_Entry, workers)

    def at(self, worker: int) -> At:
        entry = self._entries[worker]
        entry.pid = os.getpid()

        @contextmanager
        def at(what: str, sample: bool = True) -> Iterator[None]:
            entry.what, entry.sample, entry.told = what.encode(errors="backslashreplace")[:1023], sample, False
            entry.since = time.monotonic()
            try:
                yield
            finally:
                entry.since = 0

        return at

    def leave(self, worker: int) -> None:
        """The worker has nothing more to do: its end is no death."""
        self._entries[worker].pid = 0

    def culprits(self, timeout_s: float) -> list[tuple[_Entry, str]]:
        """The entries of workers that are dead or overdue, and which of the two."""
        alive = {process.pid for process in multiprocessing.active_children()}
        found = []
        for entry in self._entries:
            if entry.pid and entry.pid not in alive:
                found.append((entry, "its worker died"))
            elif entry.sample and entry.since and time.monotonic() - entry.since > timeout_s:
                found.append((entry, f"no end after {timeout_s:g} s"))
        return found

    def end_workers(self) -> None:
        """At once and whatever they are at: one that is stuck in C code would heed nothing less."""
        pids = {entry.pid for entry in self._entries}
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()

    def tell_of_slow_reads(self, after_s: float, where: str) -> None:
        """Storage sets its own limits, and a download may well take longer than a sample: only said, once each."""
        for entry in self._entries:
            if entry.since and not entry.sample and time.monotonic() - entry.since > after_s and not entry.told:
                entry.told = True
                log.warning("%s: still waiting for %s after %g s", where, entry.what.decode(errors="replace"), after_s)


@contextmanager
def _nowhere(_what: str, sample: bool = True) -> Iterator[None]:
    yield


def items(
    read: Read,
    *,
    workers: int,
    timeout_s: float,
    held: int,
    array_bytes: int,
    quarantined: dict[str, str],
    where: str,
) -> Iterator[Item]:
    """The items of all workers in turn: of worker 0, 1, …, 0, 1, …; without workers, read in this process, where
    nothing can be replaced.

    An item may hold one array, of at most ``array_bytes`` bytes. It is good until ``held`` further items were taken.
    What stops a worker is added to ``quarantined`` (sample → why) before ``read`` is called again. UserError where
    workers are replaced again and again.
    """
    if not workers:
        yield from read(0, 1, 0, _nowhere)
        return
    together = max(1, min(MOST_TOGETHER, held // workers))  # nor more than a batch takes of a worker
    prefetch = max(2, math.ceil(2 * held / (workers * together)))
    received, restarts = 0, 0
    while True:
        board = _Board(workers)
        # A worker is at most ``prefetch`` messages ahead of the one whose items are being taken.
        slots = Slots(workers, (prefetch + 1) * together + math.ceil(held / workers) + 2, array_bytes)
        iterator = _start(_Items(read, received, board, slots, together), workers, prefetch)
        arrived: list[deque[Item | UserError]] = [deque() for _ in range(workers)]
        turn = 0
        try:
            while True:
                try:
                    while not arrived[turn]:
                        worker, message = next(iterator)
                        arrived[worker].extend(message)
                    item = arrived[turn].popleft()
                except StopIteration:
                    return
                except RuntimeError as error:
                    # DataLoader's own: a wait of POLL_S, or a dead worker. What a worker raises begins otherwise.
                    if not str(error).startswith("DataLoader"):
                        raise
                    culprits = board.culprits(timeout_s)
                    if not culprits and "timed out" in str(error):
                        board.tell_of_slow_reads(timeout_s, where)
                        continue
                    break
                if isinstance(item, UserError):
                    raise item
                received, restarts, turn = received + 1, 0, (turn + 1) % workers
                sample, about = item
                yield {k: slots.get(v) if isinstance(v, Stored) else v for k, v in sample.items()}, about
            restarts += 1
            _judge(culprits, quarantined, where)
            if restarts > MOST_RESTARTS:
                raise UserError(
                    f"{where}: data workers were replaced {restarts} times without giving anything in between; the "
                    "log says what they were at. Is memory short (fewer data.workers, smaller windows) or a decoder "
                    "broken?"
                )
        finally:
            board.end_workers()
            del iterator  # waits for them now: left to the garbage collector, after an error, that can take 5 s


def _judge(culprits: list[tuple[_Entry, str]], quarantined: dict[str, str], where: str) -> None:
    """Quarantines the samples at fault."""
    if not culprits:
        log.warning("%s: a data worker died before it read anything and was replaced", where)
    for entry, why in culprits:
        what = entry.what.decode(errors="replace") if entry.since else "no work"
        log.warning("%s: data worker replaced at %s: %s", where, what, why)
        if entry.since and entry.sample:
            quarantined[what] = why


def _start(dataset: "_Items", workers: int, prefetch: int) -> Iterator[Any]:
    on_child = signal.getsignal(signal.SIGCHLD)
    iterator = iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_outlast_stop_signals,
            multiprocessing_context=_Fork(),
            prefetch_factor=prefetch,
            timeout=POLL_S,
            generator=torch.Generator(),  # of its own: loading data must not move the training's random state
        )
    )
    # torch has a dead worker raise in the main process wherever that is, inside an optimizer step for example.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
    return iterator


class _Flag:
    """An Event without a lock. A worker asks torch's before each message; killed with its lock, it would have the main
    process wait for ever when that sets it."""

    def __init__(self):
        self._set = mmap.mmap(-1, 1)  # shared with forks

    def set(self) -> None:
        self._set[0] = 1

    def is_set(self) -> bool:
        return self._set[0] == 1


class _Fork(ForkContext):
    """What a DataLoader makes its workers, queues and events of."""

    def Event(self) -> _Flag:  # noqa: N802 (the name it has in multiprocessing)
        return _Flag()


class _Items(IterableDataset):
    """What one worker reads. A UserError travels as an item: raised in a worker it would lose its one line."""

    def __init__(self, read: Read, received: int, board: _Board, slots: Slots, together: int):
        self._read, self._received, self._board, self._slots = read, received, board, slots
        self._together = together

    def __iter__(self) -> Iterator[tuple[int, list[Item | UserError]]]:
        worker = get_worker_info()
        read = self._read(worker.id, worker.num_workers, self._received, self._board.at(worker.id))
        message: list[Item | UserError] = []
        try:
            for number, (sample, about) in enumerate(read):
                put = partial(self._slots.put, worker.id, number)
                message.append(({k: put(v) if isinstance(v, np.ndarray) else v for k, v in sample.items()}, about))
                if len(message) == self._together:
                    yield worker.id, message
                    message = []
        except UserError as error:
            message.append(error)
        if message:
            yield worker.id, message
        self._board.leave(worker.id)


def _as_is(item: Any) -> Any:
    return item


def _outlast_stop_signals(_worker: int) -> None:
    """Keeps a worker alive through a stop signal to the whole process group (a SLURM step's, systemd's, a terminal's):
    the main process saves first, which it cannot once a worker is dead.

    A SIGTERM from the main process still ends the worker: so torch ends one that is stuck, and Python, when it exits,
    those left. A worker whose main process died ends by torch's watchdog, unless what it has sent blocks it: then here.
    """
    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # sigtimedwait, which tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(main: int) -> None:
    told = None
    while os.getppid() == main and (told is None or told.si_pid != main):
        told = signal.sigtimedwait({signal.SIGTERM}, ORPHANS_LOOK_S)
    os._exit(0)
