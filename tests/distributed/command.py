"""Runs the stpredict command as a person would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import bounded

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def stpredict(*arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """The finished command, whatever its exit status; stdout and stderr as text."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    return bounded(command, timeout_s, cwd=ROOT, env=ENVIRONMENT)


def started(*arguments: str | Path) -> subprocess.Popen:
    """The command, started; its output is thrown away (the run directory has it)."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
