"""A pipeline on a real SLURM that needs no torch, and so seconds."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from launcher.record import PipelineRun
from stpredict.run import Run
from tests.processes import bounded

CONFIGS = Path(__file__).parents[2] / "configs"
PROFILE = {"kind": "slurm", "partition": "all", "time": "00:05:00", "signal_delay_s": 30}


class Small:
    """shards (an array of two, merged) → report: no job of it imports torch. Everything lies in ``folder``."""

    def __init__(self, slurm, folder: Path):
        self.slurm, self.folder, self.run, self.tools = slurm, folder, folder / "run", folder / "tools"
        self.path, self.cluster = folder / "pipeline.yaml", folder / "cluster.yaml"
        self.data = {
            "kind": "pipeline",
            "name": "small",
            "run": str(self.run),
            "jobs": {
                "shards": {
                    "config": str(CONFIGS / "data" / "moving_digits.yaml"),
                    "array": 2,
                    "set": {"source": {"videos": 8, "validation_videos": 2, "frames": 4}},
                },
                "report": {
                    "config": str(CONFIGS / "priors" / "report.yaml"),
                    "needs": ["shards"],
                    "set": {"title": "small", "runs": {"shards": "${run:shards}"}},
                },
            },
        }

    def write(self, profile=None) -> None:
        self.path.write_text(yaml.safe_dump(self.data))
        self.cluster.write_text(yaml.safe_dump({**PROFILE, **(profile or {})}))

    def launch(self, *words: str, here=False, profile=None, environment=None):
        """`stpredict launch` to its end, on SLURM or ``here``; ``profile`` is changes of the cluster's."""
        self.write(profile)
        command, around = self._command(words, here, environment)
        return bounded(command, **around)

    def start(self, *words: str, environment=None) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command, around = self._command(words, False, environment)
        return subprocess.Popen(command, **around, **pipes)

    def _command(self, words, here: bool, environment: dict[str, str] | None) -> tuple[list[str], dict[str, Any]]:
        command = ["stpredict", "launch", str(self.path), *words, *([] if here else ["--cluster", str(self.cluster)])]
        path = f"{self.tools}:{self.slurm.environment['PATH']}"
        habits = {"SQUEUE_PARTITION": "none", "SINFO_PARTITION": "none"}
        env = {**self.slurm.environment, "PATH": path, **habits, **(environment or {})}
        return command, {"env": env, "cwd": self.folder}

    def wait_done(self) -> None:
        """Until SLURM has none of its jobs; fails unless all ended well."""
        self.slurm.wait_for(lambda: not self.queued())
        jobs = PipelineRun(self.run).record().jobs
        states = {name: (status := Run(self.run / name).status()) and (status.state, status.error) for name in jobs}
        assert states == dict.fromkeys(jobs, ("done", None))

    def tool(self, name: str, script: str) -> None:
        """Has ``script`` run in place of SLURM's ``name``, which it may call as $real."""
        self.tools.mkdir(exist_ok=True)
        real = shutil.which(name, path=self.slurm.environment["PATH"])
        (self.tools / name).write_text(f"#!/bin/bash\nreal={real}\n{script}\n")
        (self.tools / name).chmod(0o755)

    def queued(self) -> list[str]:
        """Its lines of squeue: id and script of each job."""
        out = self.slurm.run("squeue", "--noheader", "--format=%F %o")
        return [line for line in out.splitlines() if f"{self.run}/" in line]

    def tree(self) -> dict[Path, bytes]:
        files = [path for path in self.run.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.read_bytes() for path in files if "__pycache__" not in path.parts}
