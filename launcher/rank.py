"""One rank of a job, as the local executor starts it: ``python -m launcher.rank CONFIG PARENT``."""

import ctypes
import logging
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Has the kernel send this process SIGTERM when ``parent`` dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        raise SystemExit(f"the launcher (process {parent}) is gone")


def leave(code: int) -> NoReturn:
    """Ends this process here and now. The job is over and its status written; what Python's own way out would still do
    is tear down threads of C++ libraries, some of which abort there once in a while ("terminate called without an
    active exception"): a finished job would seem to have failed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, which is no reason to end with another status
            stream.flush()
    os._exit(code)


def main() -> NoReturn:
    config, parent = sys.argv[1:]
    end_with(int(parent))
    from stpredict.jobs.start import start

    leave(start(load(AnyJobConfig, config)))


if __name__ == "__main__":
    main()
