"""slurm/single_machine.sh itself: what it says where it cannot start, and that it clears away what a crash left."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.slurm.conftest import SCRIPT, Slurm

pytestmark = pytest.mark.slurm


def refused(slurm: Slurm, word: str) -> str:
    """What the script says, in one line, where it does not do ``word``."""
    told = subprocess.run([SCRIPT, word], env=slurm.environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1
    return told.stderr


def serves_a_job_of(process: psutil.Process, folder: Path) -> bool:
    """Whether it is a slurmstepd of the SLURM in ``folder``."""
    try:
        environment = (
            Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        )  # its title overwrote the beginning
        return process.name() == "slurmstepd" and f"SLURM_CONF={folder}/slurm.conf".encode() in environment
    except (psutil.Error, OSError):
        return False


def test_a_second_start_says_in_one_line_that_it_runs_or_that_the_port_is_taken_and_makes_nothing(slurm, tmp_path):
    assert f"it runs already: export SLURM_CONF={slurm.environment['SLURM_CONF']}" in refused(slurm, "start")
    other = Slurm(tmp_path / "other")
    other.environment["STPREDICT_SLURM_PORT"] = slurm.environment["STPREDICT_SLURM_PORT"]
    assert "is in use" in refused(other, "start")
    assert not (tmp_path / "other").exists()
    assert "no SLURM in" in refused(other, "status")
    (tmp_path / "other").mkdir()
    assert "not of this script" in refused(other, "start")
    assert "holds no SLURM" in refused(other, "stop")


def test_while_another_is_being_started_or_stopped_it_waits_and_so_both_keep_their_ports_and_names(slurm, tmp_path):
    """The names are lines of /etc/hosts, which has no other lock."""
    other = Slurm(tmp_path / "other")
    with Path("/etc/hosts").open() as hosts:
        fcntl.flock(hosts, fcntl.LOCK_EX)
        with subprocess.Popen([SCRIPT, "start"], env=other.environment, stdout=subprocess.DEVNULL) as start:
            with pytest.raises(subprocess.TimeoutExpired):
                start.wait(2)
            assert not (tmp_path / "other").exists()
            fcntl.flock(hosts, fcntl.LOCK_UN)
            assert start.wait(60) == 0
    subprocess.run([SCRIPT, "stop"], env=other.environment, check=True, timeout=60)  # the daemons have not the lock
    assert os.getuid() or str(tmp_path) not in Path("/etc/hosts").read_text()


def test_after_a_crash_start_says_what_to_do_and_stop_ends_the_jobs_left_and_removes_everything(slurm, tmp_path):
    other = Slurm(tmp_path / "crashed")
    assert not other.start()
    folder = tmp_path / "crashed"
    job = None
    try:
        other.submit(f"--output={tmp_path}/job.log", "--wrap", f"echo $$ > {tmp_path}/pid; exec sleep 600")
        other.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        job = psutil.Process(int((tmp_path / "pid").read_text()))
        for file in (*folder.glob("slurm*.pid"), folder / "munge" / "pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)
        other.wait_for(lambda: "is left of a SLURM that was killed" in refused(other, "start"), 5)
        assert job.is_running()
    finally:
        subprocess.run([SCRIPT, "stop"], env=other.environment, check=True, timeout=60)
    psutil.wait_procs([job], timeout=5)
    assert not job.is_running() or job.status() == psutil.STATUS_ZOMBIE
    assert not [left for left in psutil.process_iter() if serves_a_job_of(left, folder)]
    assert not folder.exists()
    assert os.getuid() or str(folder) not in Path("/etc/hosts").read_text()
