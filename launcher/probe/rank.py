"""One rank of `stpredict doctor --cluster`, on a compute node: says what it finds in ``rank_N.json``."""

import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_pipeline.errors import UserError
from launcher import ranks
from launcher.probe.facts import RankFacts, Stage
from launcher.rank import end_with, leave
from stpredict.jobs.requeue import job_id
from stpredict.run import node_name
from stpredict.source import output
from stpredict.training.signals import StopRequest

MEET_S = 120.0  # within so long all ranks have found each other, or the network is not what it should be
SIGNAL_S = 30.0
PACKAGES = ("deepspeed", "submitit", "webdataset", "flash-attn", "xformers")


def probe(folder: str) -> None:
    """What submitit calls in every task. Ends the process."""
    with StopRequest() as stop:  # in place of submitit's handlers, which would requeue the job
        try:
            os.environ.update(ranks.slurm_step(os.environ, least=1))
            _probe(Path(folder), stop)
        except Exception as error:
            print(f"error: {error}" if isinstance(error, UserError) else traceback.format_exc(), file=sys.stderr)
            leave(1)
        leave(0)


def _probe(folder: Path, stop: StopRequest) -> None:
    facts = RankFacts(
        rank=int(os.environ["RANK"]),
        host=node_name(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        python=platform.python_version(),
        executable=sys.executable,
        code=str(Path(__file__).parents[2]),
        cpus=len(os.sched_getaffinity(0)),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        scontrol=_scontrol(),
    )

    def begin(stage: Stage) -> None:
        facts.stage = stage
        facts.write(folder)

    begin("started")
    import torch
    import torch.distributed as dist

    facts.versions = _versions()
    facts.gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    begin("meeting")
    cuda = bool(facts.gpus)
    device = torch.device("cuda", facts.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    facts.backend = "nccl" if cuda else "gloo"
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo for what is on the CPU: clocks
    dist.init_process_group(backends, timeout=timedelta(seconds=MEET_S))
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, facts.host)
    facts.hosts = hosts
    # Imported here, since it imports torch.
    from launcher.probe import measure

    begin("bandwidth")
    facts.transfers = measure.transfers(device)
    nodes = list(dict.fromkeys(hosts))
    firsts = [hosts.index(node) for node in nodes]
    first = facts.rank in firsts
    begin("clocks")
    if first:
        facts.clock_s, facts.clock_error_s = measure.clock_offset(firsts)
    begin("disk")
    facts.disk = measure.disk(folder, len(nodes), nodes.index(facts.host) if first else None)
    facts.nodes_seen = sorted({hosts[int(path.stem[5:])] for path in folder.glob("rank_*.json")})
    begin("signal")
    end = time.monotonic() + SIGNAL_S
    while not stop and time.monotonic() < end:
        time.sleep(0.05)
    facts.signal = min(stop.received).name if stop else None
    begin("packages")
    if first:
        from launcher.doctor import findings

        facts.packages = [(name, state, detail) for name, state, detail, _ in findings()]
    begin("done")


def _scontrol() -> str | None:
    """Why this rank cannot ask SLURM's controller; None where it can, or is in no job."""
    job = job_id(os.environ)
    if job is None:
        return None
    if shutil.which("scontrol") is None:
        return "not there"
    try:
        command = ["scontrol", "show", "job", job]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except subprocess.CalledProcessError as error:
        return " ".join(error.stderr.split())
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    return None


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "kernel": platform.release()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        found["driver"] = driver.splitlines()[0]
    return found


def main() -> None:
    """One rank on this machine: ``python -m launcher.probe.rank FOLDER PARENT``."""
    folder, parent = sys.argv[1:]
    end_with(int(parent))
    with StopRequest() as stop:
        try:
            _probe(Path(folder), stop)
        except Exception:
            traceback.print_exc()
            leave(1)
    leave(0)


if __name__ == "__main__":
    main()
