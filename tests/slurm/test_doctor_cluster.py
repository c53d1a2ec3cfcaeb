"""`stpredict doctor --cluster` on a real SLURM of two nodes."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.processes import bounded
from tests.slurm.conftest import ROOT

pytestmark = pytest.mark.slurm
DOCTOR = ["stpredict", "doctor", "--json", "--cluster"]


def doctor(slurm, tmp_path: Path, *words: str, cluster: str = "slurm_single_machine") -> subprocess.CompletedProcess:
    return bounded([*DOCTOR, cluster, "--run", tmp_path / "d", *words], timeout_s=110, cwd=ROOT, env=slurm.environment)


def jobs(slurm) -> str:
    return slurm.run("squeue", "--noheader", "--name=doctor", "--format=%i %T")


def test_two_sound_nodes_pass_and_what_was_measured_is_kept(slurm, tmp_path):
    result = doctor(slurm, tmp_path, "--nodes=2")
    assert result.returncode == 0, result.stdout + result.stderr
    answer = json.loads(result.stdout)
    assert [(facts["host"], facts["hosts"]) for facts in answer["ranks"]] == [
        (host, ["one-a", "one-b"]) for host in ("one-a", "one-b")
    ]
    states = {finding["name"]: finding["state"] for finding in answer["findings"]}
    for name in ("ranks", "versions", "clocks", "folder", "warning signal", "scontrol", "torch", "deepspeed"):
        assert states[name] == "ok", answer["findings"]
    assert all(transfer["bus_bandwidth"] > 1e5 for transfer in answer["ranks"][0]["transfers"])
    assert abs(answer["ranks"][1]["clock_s"]) < 1  # the nodes have one clock
    assert json.loads((Path(answer["folder"]) / "doctor.json").read_text()) == answer
    assert not list(Path(answer["folder"]).glob("*.bin"))
    assert not jobs(slurm)


def test_ranks_that_do_not_start_are_said_to_and_the_log_has_its_say(slurm, tmp_path):
    profile = tmp_path / "broken.yaml"
    profile.write_text("{kind: slurm, partition: all, time: '01:00:00', python: /nowhere/python}")
    result = doctor(slurm, tmp_path, "--nodes=2", cluster=str(profile))
    assert result.returncode == 1
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["rank 1"]["detail"] == "wrote nothing"
    assert "/nowhere/python" in findings["job"]["detail"]


def test_a_job_that_does_not_start_in_time_is_cancelled_with_slurms_reason_in_one_line(slurm, tmp_path):
    slurm.run("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        result = doctor(slurm, tmp_path, "--timeout=2")
    finally:
        slurm.run("scontrol", "update", "PartitionName=all", "State=UP")
    assert result.returncode == 1
    said = result.stderr.strip().splitlines()[-1]
    assert "did not start in 2 s and is cancelled: PartitionDown (the partition is down" in said
    assert not jobs(slurm)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_cancels_its_job(slurm, tmp_path, number):
    slurm.run("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        command = [*DOCTOR, "slurm_single_machine", "--run", tmp_path / "d"]
        with subprocess.Popen(command, cwd=ROOT, env=slurm.environment, stderr=subprocess.PIPE, text=True) as process:
            slurm.wait_for(lambda: "PENDING" in jobs(slurm))
            process.send_signal(number)
            said = process.communicate(timeout=30)[1]
    finally:
        slurm.run("scontrol", "update", "PartitionName=all", "State=UP")
    assert process.returncode == 1
    assert "is cancelled" in said.splitlines()[-1]
    assert not jobs(slurm)
