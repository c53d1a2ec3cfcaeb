"""DeepSpeed's CPU op: a process killed while it loads it does not stop the next ones."""

import os
import signal
import sys
from pathlib import Path

import pytest

from stpredict.training.compiled_op import extensions_folder
from tests.processes import bounded, succeeding

LOAD = """
import logging, os, signal, sys
import torch.utils.file_baton as baton
logging.basicConfig()
os.environ.setdefault("DS_ACCELERATOR", "cpu")
from stpredict.training.compiled_op import load_compiled_op
if "killed" in sys.argv:
    release = baton.FileBaton.release
    baton.FileBaton.release = lambda self: os.kill(os.getpid(), signal.SIGKILL)
load_compiled_op()
print("loaded")
"""


@pytest.fixture
def own_folder(tmp_path) -> dict[str, str]:
    """An environment whose compiled ops are copies, so that no other test waits for what is left there."""
    compiled = next(extensions_folder().glob("**/deepspeed_shm_comm"), None)
    if compiled is None:
        pytest.skip("compiled on a CPU only; `stpredict doctor` has not done it here")
    succeeding(["cp", "-a", str(compiled), str(tmp_path)])
    return {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}


def test_the_lock_of_a_killed_process_is_removed_and_said(own_folder):
    command = [sys.executable, "-c", LOAD]
    killed = bounded([*command, "killed"], 300, env=own_folder)
    assert killed.returncode == -signal.SIGKILL
    assert list(Path(own_folder["TORCH_EXTENSIONS_DIR"]).glob("deepspeed_shm_comm/lock"))
    again = bounded(command, 300, env=own_folder)
    assert "loaded" in again.stdout, again.stderr
    assert "left by a process that was killed; removed" in again.stderr


def test_two_environments_of_a_user_do_not_share_what_they_compile(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a virtual environment")
    assert extensions_folder() == Path(sys.prefix) / "torch_extensions"
    from torch.utils.cpp_extension import _get_build_directory

    assert Path(_get_build_directory("anything", verbose=False)).is_relative_to(sys.prefix)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    assert extensions_folder() == Path("elsewhere")
