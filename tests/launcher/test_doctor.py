import json
import os
import sys

from launcher.doctor import Check, Finding, _find, slurm
from tests.processes import succeeding


def test_what_is_missing_fails_only_if_it_is_required():
    def broken():
        raise ImportError("libcuda.so\nnot found")

    assert _find(Check("x", True, broken)) == Finding("x", "failed", "libcuda.so not found")
    assert _find(Check("x", False, broken)) == Finding("x", "missing", "libcuda.so not found")
    assert _find(Check("x", True, lambda: "1.0")) == Finding("x", "ok", "1.0")


def test_slurms_commands_without_a_cluster_are_one_clear_line(tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: fetch_config: DNS SRV lookup failed' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = _find(Check("SLURM", False, slurm))
    assert finding.state == "missing"
    assert finding.detail.endswith("no cluster's slurm.conf; where it lies elsewhere, set SLURM_CONF to it")


def test_of_the_local_cluster_ranks_here_are_examined(tmp_path):
    command = [sys.executable, "-m", "launcher", "doctor", "--cluster", "local", "--processes", "2", "--json"]
    said = succeeding([*command, "--run", tmp_path / "d"], timeout_s=300)
    assert "(2 of 2 ranks are there)" in said.stderr, "no terminal: a line for each step"
    answer = json.loads(said.stdout)
    assert [facts["rank"] for facts in answer["ranks"]] == [0, 1]
    states = {finding["name"]: finding["state"] for finding in answer["findings"]}
    assert {states[name] for name in ("ranks", "all-reduce of 16 MiB", "warning signal", "torch")} == {"ok"}
