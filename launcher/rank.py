"""One rank of a job, as the local executor starts it: ``python -m launcher.rank CONFIG PARENT``."""

import ctypes
import os
import signal
import sys

from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Has the kernel send this process SIGTERM when ``parent`` dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        raise SystemExit(f"the launcher (process {parent}) is gone")


def main() -> int:
    config, parent = sys.argv[1:]
    end_with(int(parent))
    from stpredict.jobs.start import start

    return start(load(AnyJobConfig, config))


if __name__ == "__main__":
    sys.exit(main())
