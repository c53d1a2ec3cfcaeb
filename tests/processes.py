"""Commands that tests run: none may take for ever."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest


def bounded(command: Sequence[str | Path], timeout_s: float = 120, **options) -> subprocess.CompletedProcess:
    """The command's exit status, stdout and stderr as text. One that takes longer than ``timeout_s`` is killed with
    all of its process group, and the test fails with what it had said and where it was."""
    pipe = subprocess.PIPE
    options["env"] = {"PYTHONFAULTHANDLER": "1", **options.get("env", os.environ)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGABRT)  # each Python says where it is
                time.sleep(1)
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out, errors = process.communicate(timeout=20)
            pytest.fail(f"{command}: no end after {timeout_s:g} s\n{out[-3000:]}\n{errors[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def succeeding(command: Sequence[str | Path], timeout_s: float = 120, **options) -> subprocess.CompletedProcess:
    """Like ``bounded``, of a command that must end with 0."""
    result = bounded(command, timeout_s, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result
