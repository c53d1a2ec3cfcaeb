"""A function in processes that it may crash or hang: decoders do, on files that are damaged enough. Torch-free.

A worker has one item at a time and a pipe of its own, so a death is always the fault of the item that the worker had.
(The pools of the standard library and of pebble share pipes and locks between workers; there a death breaks the whole
pool, or is put on the wrong item.)
"""

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from data_pipeline.errors import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
_END = object()


@dataclass(frozen=True)
class Failure:
    """Instead of a result: why there is none."""

    reason: str


def isolated(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, timeout_s: float
) -> Iterator[Result | Failure]:
    """``function(item)`` of every item, in the order of the items; a Failure where its process died or took longer
    than ``timeout_s``. An exception of ``function`` is raised here.

    ``function`` must be importable and its items and results picklable. Never more than two items a worker are taken
    from ``items`` ahead of what was yielded.
    """
    items, pending = iter(items), deque[_Task]()
    pool = [_Worker(function) for _ in range(workers)]
    try:
        while True:
            for index, worker in enumerate(pool):
                if worker.task is None and len(pending) < 2 * workers and (item := next(items, _END)) is not _END:
                    if worker.connection.poll():  # its end: it died after its last answer
                        worker.kill()
                        worker = pool[index] = _Worker(function)
                    pending.append(worker.start(item, timeout_s))
            if not pending:
                return
            if pending[0].outcome:
                yield pending.popleft().outcome[0]
                continue
            busy = [worker for worker in pool if worker.task]
            soonest = min(worker.task.deadline for worker in busy)
            ready = wait([worker.connection for worker in busy], max(0.0, soonest - time.monotonic()))
            for index, worker in enumerate(pool):
                if worker.task is None:
                    continue
                if worker.connection in ready:
                    alive = worker.receive()
                elif alive := time.monotonic() < worker.task.deadline:
                    continue
                else:
                    worker.fail(f"took longer than {timeout_s:g} s")
                if not alive:
                    pool[index] = _Worker(function)
    finally:
        for worker in pool:
            worker.kill()


class _Task:
    """An item given to a worker; ``outcome`` holds what came of it, once that is known."""

    def __init__(self, deadline: float):
        self.deadline, self.outcome = deadline, []


class _Worker:
    def __init__(self, function: Callable):
        # From a server without threads: a fork of this process could inherit a lock that another thread holds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", function.__module__])
        self.task: _Task | None = None
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.connection.recv()  # so that no item pays for the imports
        except EOFError:
            self._process.join()
            raise UserError(
                f"a worker process died as it began ({_cause(self._process.exitcode)}); a script that starts workers "
                'must do so below `if __name__ == "__main__":`'
            ) from None

    def start(self, item: Item, timeout_s: float) -> _Task:
        self.task = _Task(time.monotonic() + timeout_s)
        with suppress(OSError):  # it died just now: `receive` will find out
            self.connection.send(item)
        return self.task

    def receive(self) -> bool:
        """Takes what the worker sent; False if it died instead."""
        try:
            result, error = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self.fail(f"the process that read it died ({_cause(self._process.exitcode)})")
            return False
        if error is not None:
            raise error
        self.task.outcome.append(result)
        self.task = None
        return True

    def fail(self, reason: str) -> None:
        self.task.outcome.append(Failure(reason))
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(function: Callable, connection: Connection) -> None:
    """What a worker does until its other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the main process
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = function(item), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        connection.send(answer)


def _cause(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"
