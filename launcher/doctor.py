"""What ``stpredict doctor`` shows: what works on this machine. It builds DeepSpeed's ops for the CPU, so that
no job has to. (``probe`` is what it does on a cluster's nodes.)"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

GB = 1e9


class Check(NamedTuple):
    name: str
    required: bool
    ask: Callable[[], str]  # returns what to show; raises where it does not work


class Finding(NamedTuple):
    name: str
    state: str  # ok, failed (required), missing (optional), warning
    detail: str
    advice: str = ""  # what to do about it


def doctor(as_json: bool) -> int:
    """Prints the findings; exit status 1 if something that every job needs does not work."""
    found = findings()
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        show(found)
    return exit_status(found)


def findings() -> list[Finding]:
    """What works on this machine. What libraries print meanwhile goes to standard error."""
    with redirect_stdout(sys.stderr), Console(stderr=True).status("looking (the first time compiles for a minute)"):
        return [_find(check) for check in CHECKS]


def show(found: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    colours = {"ok": "green", "failed": "red", "missing": "yellow", "warning": "yellow"}
    table = Table("check", "state", "detail", box=box.SIMPLE)
    for finding in found:
        table.add_row(finding.name, Text(finding.state, colours[finding.state]), Text(finding.detail))
    console.print(table)
    for finding in found:
        if finding.advice:
            console.print(f"{finding.name}: {finding.advice}", soft_wrap=True, markup=False)


def exit_status(found: Iterable[Finding]) -> int:
    return 1 if any(finding.state == "failed" for finding in found) else 0


def _find(check: Check) -> Finding:
    try:
        return Finding(check.name, "ok", check.ask())
    except Exception as error:
        reason = "not installed" if isinstance(error, PackageNotFoundError) else " ".join(str(error).split())
        return Finding(check.name, "failed" if check.required else "missing", reason or repr(error))


def _package(distribution: str, module: str) -> Callable[[], str]:
    def ask() -> str:
        found = version(distribution)
        importlib.import_module(module)
        return found

    return ask


def _tool(name: str) -> Callable[[], str]:
    def ask() -> str:
        if (path := shutil.which(name)) is None:
            raise FileNotFoundError(f"{name} is not in PATH")
        result = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20)
        return result.stdout.splitlines()[0]

    return ask


def slurm() -> str:
    """Its version and whether its controller answers; RuntimeError where it does not, or where there is no cluster."""
    from launcher.slurm.queue import NO_CLUSTER

    said = _tool("sbatch")
    try:
        found = said()
    except subprocess.CalledProcessError:
        raise RuntimeError(NO_CLUSTER) from None
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    if ping.returncode:
        raise RuntimeError(f"{found}: {' '.join(ping.stdout.split()) or 'its controller does not answer'}")
    return f"{found}, {' '.join(ping.stdout.split())}"


def _python() -> str:
    return f"{sys.version.split()[0]} ({sys.executable})"


def _torch() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {f'CUDA {torch.version.cuda}: ' + ', '.join(gpus) if gpus else 'no GPU'}"


def _bf16() -> str:
    import torch

    if torch.cuda.is_available():
        return "real on this GPU" if torch.cuda.is_bf16_supported() else "emulated on this GPU: use fp32"
    real = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "real on this CPU" if real else "emulated on this CPU, up to 30 times slower: `precision: auto` takes fp32"


def _attention(backend: str) -> Callable[[], str]:
    def ask() -> str:
        from stpredict.attention.trial import try_backend

        return try_backend(backend)

    return ask


def _deepspeed() -> str:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return f"{deepspeed.__version__} on {get_accelerator().device_name()}"
    from stpredict.training.compiled_op import load_compiled_op

    began = time.monotonic()
    load_compiled_op()
    return f"{deepspeed.__version__}, deepspeed_shm_comm loaded in {time.monotonic() - began:.1f} s"


def _cpu_adam() -> str:
    from stpredict.training.compiled_op import CPU_ADAM, load_compiled_op

    began = time.monotonic()
    load_compiled_op(CPU_ADAM)
    return f"for training.offload.optimizer: loaded in {time.monotonic() - began:.1f} s"


def _av() -> str:
    import av

    if "libx264" not in av.codecs_available:
        raise RuntimeError(f"{av.__version__} has no libx264 encoder")
    return f"{av.__version__}, with libx264"


def _disk() -> str:
    free = shutil.disk_usage(".").free
    if free < GB:
        raise RuntimeError(f"{free / GB:.1f} GB free in {Path.cwd()}")
    return f"{free / GB:.0f} GB free in {Path.cwd()}"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB available"


def _cores() -> str:
    return f"{len(os.sched_getaffinity(0))} (load {os.getloadavg()[0]:.1f})"


CHECKS = (
    Check("python", True, _python),
    Check("cores", True, _cores),
    Check("memory", True, _memory),
    Check("disk", True, _disk),
    Check("g++", True, _tool("g++")),
    Check("ninja", True, _tool("ninja")),
    Check("torch", True, _torch),
    Check("bf16", True, _bf16),
    Check("deepspeed", True, _deepspeed),
    Check("cpu_adam", False, _cpu_adam),
    Check("webdataset", True, _package("webdataset", "webdataset")),
    Check("av", True, _av),
    Check("decord", True, _package("decord", "decord")),
    Check("flash-attn", False, _package("flash-attn", "flash_attn")),
    Check("xformers", False, _package("xformers", "xformers.ops")),
    *(Check(f"attention: {name}", name == "sdpa", _attention(name)) for name in ("sdpa", "flex", "flash", "xformers")),
    Check("SLURM", False, slurm),
)
