"""SIGTERM and SIGUSR2 ask for a stop; the loop finishes its step, saves and leaves. Handlers only set a flag."""

import signal


class StopRequest:
    """True once a signal came. Used as a context, it puts the handlers that were there before back."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)


class Preempted(Exception):  # noqa: N818 (not an error: the job stopped early and can be resumed)
    """Raised by a job that saved its state because it was asked to stop: exit status 75."""
