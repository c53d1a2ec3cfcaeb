"""SIGTERM and SIGUSR2 ask for a stop. Handlers only set a flag, which the training loop reads at its step boundaries;
a job that loses nothing wherever it is left has the handler raise."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = "run again to continue"  # what happens next, where nothing does so by itself


class Preempted(BaseException):
    """Raised by a job that was asked to stop, once its state is saved: exit status 75. It is not an error: no code that
    expects any kind of them, from a decoder say, may take it for one."""


class StopRequest:
    """True once a stop signal came. Used as a context, in the main thread; it puts the handlers that were there before
    back. One inside another shares what that one ``received``, so that no signal is lost from one to the next.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self):
        self.received: set[signal.Signals] = set()
        self._before: dict[signal.Signals, object] = {}
        self._raising = False

    def __enter__(self) -> "StopRequest":
        outer = getattr(signal.getsignal(self.SIGNALS[0]), "__self__", None)
        if isinstance(outer, StopRequest):
            self.received = outer.received
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raises Preempted inside, at the first signal or, if that came before, at once. What has to be cleaned up
        then is left alone by further signals."""
        self._raising = True
        try:
            if self:
                raise Preempted("stopped")
            yield
        finally:
            self._raising = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        first = not self.received
        self.received.add(signal.Signals(number))
        if self._raising and first:
            raise Preempted("stopped")


@contextmanager
def sparing_children() -> Iterator[None]:
    """Processes started inside outlive stop signals, which this one heeds at the end at the latest: SLURM signals every
    process of a step, and a compiler that dies of it would make the job fail."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
