"""A real SLURM with two nodes on this machine; skips where none is installed, or none starts."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.record import PipelineRun, Record
from tests.processes import succeeding

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "single_machine.sh"
SBIN = f"{os.environ['PATH']}:/usr/sbin"  # where the daemons are
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Slurm:
    """Its commands, in an environment in which `stpredict` is this one and each rank takes one thread."""

    def __init__(self, folder: Path):
        path = f"{Path(sys.executable).parent}:{SBIN}"
        mine = {"PATH": path, "STPREDICT_SLURM_DIR": str(folder), "STPREDICT_SLURM_PORT": str(_free_ports(3))}
        ranks = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"} if os.getuid() else {"OMP_NUM_THREADS": "1"}
        around = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**around, **mine, **ranks, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> str | None:
        """Where no SLURM starts: the line that says why, of what the script says and the logs that it shows."""
        with tempfile.TemporaryFile("w+") as said:  # its daemons would keep a pipe open for ever
            ended = subprocess.run([SCRIPT, "start"], env=self.environment, timeout=120, stdout=said, stderr=said)
            said.seek(0)
            lines = said.read().splitlines()[::-1]
        if ended.returncode == 0:
            return None
        return next((line for word in ("fatal", "error", "") for line in lines if word in line), "it says nothing")

    def run(self, *command: str | Path) -> str:
        command = [str(word) for word in command]
        return succeeding(command, timeout_s=60, cwd=ROOT, env=self.environment).stdout

    def submit(self, *arguments: str | Path) -> str:
        return self.run("sbatch", "--parsable", *arguments).strip()

    def about(self, job: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, Reason, ..."""
        return dict(re.findall(r"\b(\w+)=(\S+)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def requeued(self, job: str, restarts: int = 1, timeout_s: float = 240) -> dict[str, str]:
        """Waits until the job waits for its start number ``restarts`` + 1; what SLURM then says of it."""
        wanted = {"JobState": "PENDING", "Restarts": str(restarts)}
        self.wait_for(lambda: wanted.items() <= self.about(job).items(), timeout_s)
        return self.about(job)

    def start_now(self, job: str, *changes: str) -> None:
        """Starts a requeued job, which otherwise waits for two minutes."""
        time.sleep(2)  # within the second in which its last start was ended, a node may refuse the next one
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)

    def ranks(self, job: str) -> dict[int, tuple[int, str]]:
        """Of a job's ranks those that run: rank → process and node."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                own = process.environ()
                array = "SLURM_ARRAY_JOB_ID" in own
                its = f"{own['SLURM_ARRAY_JOB_ID']}_{own['SLURM_ARRAY_TASK_ID']}" if array else own.get("SLURM_JOB_ID")
                here = own.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if here and its == job and "SLURM_STEP_ID" in own and process.parent().name().startswith("slurmstepd"):
                    found[int(own["SLURM_PROCID"])] = process.pid, own["SLURMD_NODENAME"]
        return found

    def wait(self, job: str, state: str, timeout_s: float = 120) -> dict[str, str]:
        """Until the job is in ``state``; what SLURM then says of it. Fails where it ends in another."""
        self.wait_for(lambda: self.about(job)["JobState"] in (state, *OVER), timeout_s)
        about = self.about(job)
        assert about["JobState"] == state, about
        return about

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.run("squeue")
            time.sleep(0.1)


class Pipelines:
    """tests/slurm/pipeline.yaml on a real SLURM, launched as a person would."""

    path = ROOT / "tests" / "slurm" / "pipeline.yaml"

    def __init__(self, slurm: Slurm):
        self.slurm = slurm

    def launch(self, run: Path, *words: str) -> Record:
        """Launches it into ``run``; ``words`` are further ones of the command line."""
        self.slurm.run("stpredict", "launch", self.path, "--cluster", "slurm_single_machine", f"run={run}", *words)
        return PipelineRun(run).record()

    def wait(self, run: Path, timeout_s: float = 240) -> None:
        """Until SLURM has none of its jobs."""
        ids = {name.partition("_")[0] for name in PipelineRun(run).record().slurm_ids()}
        queue = ["squeue", "--noheader", "--format=%F"]
        self.slurm.wait_for(lambda: not ids & set(self.slurm.run(*queue).split()), timeout_s)


@pytest.fixture(scope="session")
def pipelines(slurm) -> Pipelines:
    return Pipelines(slurm)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=SBIN)]
    if missing:
        pytest.skip(f"needs SLURM, here is no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "s")
    if why := slurm.start():
        subprocess.run([SCRIPT, "stop"], env=slurm.environment, check=False, timeout=120)
        # A sandbox may forbid what its daemons need; what tests every change is not to pass without them.
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"SLURM is installed and does not start: {why}")
    yield slurm
    subprocess.run([SCRIPT, "stop"], env=slurm.environment, check=True, timeout=120)


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody has. Test sessions that run at once begin elsewhere."""
    for number in range(3_000):
        first = 20_000 + (os.getpid() + number) % 3_000 * count
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")
