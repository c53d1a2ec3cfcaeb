"""How fast forecasters train: step time and memory by precision, memory format and compilation.

    .venv/bin/python -m benchmarks.forecasters [CONFIG...] [--rounds N] [--batch N] [--threads N] [--sides SIDE...]

Steps of the real engine (forward, backward, update; ZeRO-0, no recomputation) on made-up clips, the same at every
step: by default of Moving MNIST gSTA (46.8 M parameters) and TaxiBJ ConvNeXt (7.8 M), batch 4. A side is PRECISION,
PRECISION-compiled, and either with -contiguous, in which encoder, translator and decoder get their images channel by
channel, by a copy, instead of channels-last, as the model lays them out. Sides take turns within one process per
config; medians, and times the first side. Memory is of a process of its own for each side: what the peak of its
resident set is above that before the model was built or, on CUDA, what was allocated at most. Compilation is not part
of a step; its seconds are given. On a CPU that does not compute in bf16, bf16 is left out unless --sides asks for it:
it is slower there than fp32. Prints markdown; timings mean something only where nothing else runs.
"""

import argparse
import json
import os
import resource
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
from stpredict.estimates.planned import plan_training
from stpredict.forecasters.scaling import Scaling
from stpredict.forecasters.task import ForecasterTask
from stpredict.jobs.config import ForecasterJobConfig
from stpredict.training.learner import Learner
from stpredict.training.precision import cpu_bf16_is_real
from stpredict.training.ranks import Ranks, join_ranks
from stpredict.training.task import Batch

CONFIGS = ["configs/forecasters/moving_mnist_gsta.yaml", "configs/forecasters/taxibj_convnext.yaml"]
PRECISIONS, CHANGES = ("fp32", "bf16"), ("", "-contiguous", "-compiled", "-compiled-contiguous")
WARM_UP = 2
STEPS_FOR_MEMORY = 3


class Side:
    """A config trained in one way."""

    def __init__(self, path: str, side: str, batch: int, ranks: Ranks):
        precision, *ways = side.split("-")
        changes = [f"training.precision={precision}", f"training.compile={str('compiled' in ways).lower()}"]
        changes += [f"training.batch_size={batch}", "training.micro_batch_size=null", "training.zero_stage=0"]
        config = load(ForecasterJobConfig, path, ["resources.processes=1", *changes])
        channels = config.model.channels
        scaling = Scaling((0.0,) * channels, (255.0,) * channels)
        torch.manual_seed(0)
        with ranks.device:
            task = ForecasterTask(config.model, config.loss, config.data, (scaling, scaling), config.seed)
            sample = plan_training(config).sample
            clip = sample["clip"]
            clips = torch.randint(256, (batch, *clip.shape), device=ranks.device, dtype=torch.uint8)
        if "contiguous" in ways:
            for part in (task.model.encoder, task.model.translator, task.model.decoder):
                part.register_forward_pre_hook(as_contiguous)
        self.batch: Batch = {"key": [str(number) for number in range(batch)], "clip": clips.to(clip.dtype)}
        if "kept" in sample:
            self.batch["kept"] = torch.ones(batch, *sample["kept"].shape, device=ranks.device)
        self.learner, self.counts, self.steps = Learner(task, config.training, ranks), task.counts(self.batch), 0
        self.parameters = sum(parameter.numel() for parameter in task.model.parameters())

    def step(self) -> None:
        self.learner.step(self.steps, [dict(self.batch)], self.counts)
        self.steps += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=default_sides(), metavar="SIDE")
    parser.add_argument("--job", choices=["time", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.job:
        with join_ranks() as ranks:
            {"time": measure_time, "memory": measure_memory}[arguments.job](arguments, ranks)
        leave(0)
    print(f"{machine()}, batch {arguments.batch}\n")
    print("| config | parameters | side | step ms | times | first steps s | memory MB |")
    print("|---|---|---|---|---|---|---|")
    for config in arguments.configs:
        found = in_a_process(config, arguments, "time", arguments.sides)
        for side in arguments.sides:
            seconds, first, parameters = (found[side][name] for name in ("step_s", "first_s", "parameters"))
            times = seconds / found[arguments.sides[0]]["step_s"]
            memory = in_a_process(config, arguments, "memory", [side])["bytes"] / 1e6
            cells = [Path(config).stem, f"{parameters:,}", side, f"{seconds * 1e3:,.0f}", f"**{times:.2f}**"]
            print(f"| {' | '.join([*cells, f'{first:.1f}', f'{memory:,.0f}'])} |", flush=True)
    print(f"\nLoad average afterwards {os.getloadavg()[0]:.1f}.")


def as_contiguous(_module: torch.nn.Module, images: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # Not contiguous(), which leaves the strides of a single channel as they are.
    return tuple(image.clone(memory_format=torch.contiguous_format) for image in images)


def default_sides() -> list[str]:
    real = torch.cuda.is_available() or cpu_bf16_is_real()
    return [f"{precision}{change}" for precision in PRECISIONS[: 1 + real] for change in CHANGES]


def in_a_process(config: str, arguments: argparse.Namespace, job: str, sides: list[str]) -> dict:
    """What ``job`` prints last. RuntimeError where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.forecasters", config, "--job", job, "--sides", *sides]
    for name in ("rounds", "batch", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{config}: {job} of {', '.join(sides)} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure_time(arguments: argparse.Namespace, ranks: Ranks) -> None:
    [path] = arguments.configs
    sides, first = {}, {}
    for name in arguments.sides:
        sides[name] = Side(path, name, arguments.batch, ranks)
        began = time.perf_counter()
        for _ in range(WARM_UP):
            timed(sides[name].step, ranks.device)
        first[name] = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            seconds[name].append(timed(side.step, ranks.device))
    found = {
        name: {"step_s": median(seconds[name]), "first_s": first[name], "parameters": side.parameters}
        for name, side in sides.items()
    }
    print("RESULT " + json.dumps(found), flush=True)


def measure_memory(arguments: argparse.Namespace, ranks: Ranks) -> None:
    [path], [name] = arguments.configs, arguments.sides
    cuda = ranks.device.type == "cuda"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    side = Side(path, name, arguments.batch, ranks)
    for _ in range(STEPS_FOR_MEMORY):
        side.step()
    most = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"bytes": most - (0 if cuda else before)}), flush=True)


if __name__ == "__main__":
    main()
