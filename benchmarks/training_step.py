"""How fast a prior trains on one GPU: steps of the real engine at the largest micro-batch that fits.

    .venv/bin/python -m benchmarks.training_step [CONFIG...] [--seconds S] [--micro-batches N...] [--set KEY=VALUE...]

Each config (default: NBP-XL, XXL and 3B on K600's shape) is trained in a process of its own on made-up tokens, the
same at every step, with micro-batches that double until one does not fit or ``--seconds`` are over. A step is a
forward, a backward and an update. FLOPs are the model's own (three forwards; attention by its mask's exact fraction,
recomputation not counted), beside the largest product of bf16 matrices that the same process measures and the GPU's
datasheet. Prints markdown. Timings mean something only where nothing else runs. Without a GPU only models that were
made small by --set are of use.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.engine import machine, timed
from launcher.rank import leave
from stpredict.config import load
from stpredict.jobs.config import PriorJobConfig
from stpredict.priors.data import PlannedLatents
from stpredict.priors.task import PriorTask
from stpredict.training.flops import FORWARDS_PER_STEP
from stpredict.training.gpu_peaks import known_peak
from stpredict.training.learner import Learner
from stpredict.training.ranks import Ranks, join_ranks

CONFIGS = [f"configs/priors/nbp_{size}_k600.yaml" for size in ("xl", "xxl", "3b")]
WARM_UP, ROUNDS = 3, 7
DOUBLING = (1, 2, 4, 8, 16, 32, 64, 128)
# ZeRO-1 on one rank divides nothing: bf16 weights, and fp32 ones with the moments, as with more ranks.
ON_ONE_GPU = ["tokenizer=(none)", "data.latents=(none)", "resources.processes=1", "training.zero_stage=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--seconds", type=float, default=60, help="for each config, after which no step is begun")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=DOUBLING)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configs")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        with join_ranks() as ranks:
            measured(arguments, ranks)
        leave(0)
    print(f"{machine()}\n")
    print("| config | parameters | recomputed | micro-batch | step ms | tokens/s | TFLOP/s | of matmul | MFU | GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    failed = [config for config in arguments.configs if not in_a_process(config, arguments)]
    print(f"\nLoad average afterwards {os.getloadavg()[0]:.1f}.")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def in_a_process(config: str, arguments: argparse.Namespace) -> bool:
    """Prints its rows as they come. Whether there was one: what does not fit is no failure, once something did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.training_step", config, "--rank"]
    command += ["--seconds", str(arguments.seconds), "--micro-batches", *map(str, arguments.micro_batches)]
    command += ["--set", *arguments.set] if arguments.set else []
    rows = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith("RESULT "):
                continue
            rows += 1
            found = json.loads(line.removeprefix("RESULT "))
            cells = [Path(config).stem, f"{found['parameters']:,}", found["policy"], found["micro_batch"]]
            cells += [f"{found['step_s'] * 1e3:,.0f}", f"{found['tokens_per_s']:,.0f}", f"{found['tflops']:.4g}"]
            cells += [f"**{found['tflops'] / found['matmul_tflops']:.2f}** of {found['matmul_tflops']:.4g}"]
            cells += [f"{found['mfu']:.2f}" if found["mfu"] else "", f"{found['gb']:.1f}" if found["gb"] else ""]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return process.returncode == 0 and rows > 0


def measured(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Prints a RESULT for every micro-batch that fits."""
    [path] = arguments.configs
    matmul = matmul_tflops(ranks.device)
    most = max(arguments.micro_batches)
    changes = [*ON_ONE_GPU, f"training.batch_size={most}", f"training.micro_batch_size={most}", *arguments.set]
    config = load(PriorJobConfig, path, changes)
    torch.manual_seed(0)
    with ranks.device:
        task = PriorTask(config.model, PlannedLatents(config.latent), None, 0)
    learner = Learner(task, config.training, ranks)
    ids = torch.randint(config.latent.codebook_size, (most, *config.latent.grid), device=ranks.device)
    began, number = time.monotonic(), 0
    for size in arguments.micro_batches:
        batch = {"key": [str(n) for n in range(size)], "latent": ids[:size]}
        counts = task.counts(batch)
        seconds: list[float] = []
        try:
            while len(seconds) < WARM_UP + ROUNDS:
                if time.monotonic() - began > arguments.seconds:
                    return
                seconds.append(timed(lambda: learner.step(number, [dict(batch)], counts), ranks.device))  # noqa: B023
                number += 1
        except torch.cuda.OutOfMemoryError:
            print(f"micro-batch {size} does not fit", file=sys.stderr)
            if size == arguments.micro_batches[0]:
                raise
            return
        step = median(seconds[WARM_UP:])
        tflops = FORWARDS_PER_STEP * size * task.model.flops() / step / 1e12
        cuda = ranks.device.type == "cuda"
        peak = known_peak(torch.cuda.get_device_name(), "bf16") if cuda else None
        found = {
            "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
            "policy": config.training.activation_checkpointing.policy,
            "micro_batch": size,
            "step_s": step,
            "tokens_per_s": task.tokens(batch) / step,
            "tflops": tflops,
            "matmul_tflops": matmul,
            "mfu": tflops / peak if peak else None,
            "gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        }
        print("RESULT " + json.dumps(found), flush=True)


def matmul_tflops(device: torch.device) -> float:
    """Of the fastest of a few products of square bf16 matrices."""
    rates = []
    for n in (4096, 8192, 16384) if device.type == "cuda" else (1024,):
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
        seconds = [timed(lambda: a @ b, device) for _ in range(WARM_UP + ROUNDS)]  # noqa: B023
        rates.append(2 * n**3 / median(seconds[WARM_UP:]) / 1e12)
    return max(rates)


if __name__ == "__main__":
    main()
