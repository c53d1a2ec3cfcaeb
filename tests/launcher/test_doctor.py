import os
import time

import psutil
import pytest

from launcher.doctor import STALE_S, Check, _deepspeed, _find, extensions_folder, remove_stale_locks


def make_lock(folder, age_s):
    lock = folder / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


class Process:
    def __init__(self, name, username):
        self.info = {"name": name, "username": username}


def test_only_an_old_lock_without_a_compiler_here_is_removed(tmp_path, monkeypatch):
    import getpass

    lock = make_lock(tmp_path, age_s=STALE_S + 60)
    monkeypatch.setattr(psutil, "process_iter", lambda _: iter([Process("cc1plus", getpass.getuser())]))
    assert remove_stale_locks(tmp_path) == ([], [lock])
    monkeypatch.setattr(psutil, "process_iter", lambda _: iter([Process("bash", getpass.getuser())]))
    assert remove_stale_locks(tmp_path) == ([lock], [])
    assert not lock.exists()
    make_lock(tmp_path, age_s=STALE_S - 60)  # perhaps of a compiler on another node
    assert remove_stale_locks(tmp_path) == ([], [lock])
    assert lock.exists()


def test_a_compilation_that_may_be_running_is_said_and_not_waited_for(tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        pytest.skip("compiles on a CPU only")
    lock = make_lock(tmp_path, age_s=60)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _, state, detail = _find(Check("deepspeed", True, _deepspeed))
    assert state == "failed"
    assert f"{lock} exists. Wait for it; if there is none, remove that file" in detail


def test_locks_are_looked_for_where_torch_compiles(monkeypatch, tmp_path):
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(extensions_folder()) == get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path


def test_what_is_missing_fails_only_if_it_is_required():
    def broken():
        raise ImportError("libcuda.so\nnot found")

    assert _find(Check("x", True, broken)) == ("x", "failed", "libcuda.so not found")
    assert _find(Check("x", False, broken)) == ("x", "missing", "libcuda.so not found")
    assert _find(Check("x", True, lambda: "1.0")) == ("x", "ok", "1.0")
