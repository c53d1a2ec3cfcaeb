"""What the engine costs beside DeepSpeed alone: the time of a step, and memory at each ZeRO stage.

    .venv/bin/python -m benchmarks.engine steps  [--pairs N] [--precision P] [--layers N] [--width N]
    .venv/bin/python -m benchmarks.engine memory [--ranks 2 4] [--parameters N]

Both start processes on this machine and print markdown; timings mean something only where nothing else runs.

steps   A transformer (NBP's prior) trained by the Trainer, and the same model by a bare DeepSpeed loop (forward, loss,
        backward, step) with the same DeepSpeed config, optimizer and batches. The two take turns within one process:
        whenever the Trainer asks for its next batch, the bare loop makes its step first. A turn of the Trainer is all
        that it does from getting a batch to asking for the next (counts, logging and status file too), with ranks
        waiting for each other before and after both. Medians of the ratios, turn by turn, with the 95 % interval from
        order statistics; and the ratio of the sums, in which steps that log weigh as they should.
memory  Bytes of all live tensors of a rank, after a step and the most at the moments of one where they can be counted
        (after forward, with each gradient in backward, after it, before and after the optimizer), against the
        textbook's bytes per parameter. Two models, of N and N / 4 parameters, tell what grows with the parameters from
        what does not (buckets of a fixed size). Activations are one sample's.
"""

import argparse
import copy
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from math import comb
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.config import Config
from launcher.rank import leave
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.run import Run
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import build_optimizer
from stpredict.training.engine import Trainer
from stpredict.training.ranks import Ranks, join_ranks
from stpredict.training.task import Batch, Share, Task

CODEBOOK, GRID, BLOCK = 1024, (4, 8, 8), (1, 1, 8)
WARM_UP = 10
NEVER = 10**9
#: Of ``steps``: processes and ZeRO stage.
STEPS_AT = [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
#: Of ``memory``: precision and ZeRO stage.
MEMORY_AT = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


class Export(Config):
    step: int = 0


class BenchmarkTask(Task):
    """A model on made-up samples, the same ones at every step; ``before_draw`` is called at every step boundary and
    ``after_forward`` after each forward."""

    metrics = ("loss",)

    def __init__(self, model: nn.Module, batch: Batch, loss: Callable[[Callable, Batch], Tensor]):
        self.model, self.batch, self.loss = model, batch, loss
        self.weights = {"loss": 1.0}
        self.quarantined = {}
        self.before_draw: Callable[[], None] = lambda: None
        self.after_forward: Callable[[], None] = lambda: None

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> "BenchmarkBatches":
        return BenchmarkBatches(self)

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        yield self.batch

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": 1.0}

    def training_step(self, forward: Callable, batch: Batch) -> dict[str, Tensor]:
        loss = self.loss(forward, batch)
        self.after_forward()
        return {"loss": loss}

    def validation_step(self, forward: Callable, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss(forward, batch)}

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["loss"])}

    def picture(self, forward: Callable, batch: Batch) -> np.ndarray:
        return np.zeros((1, 8, 8, 3), np.uint8)

    def export_config(self) -> Export:
        return Export()


class BenchmarkBatches:
    def __init__(self, task: BenchmarkTask):
        self.task, self.consumed, self.replaced = task, {"made up": 0}, 0

    def draw(self, step: int, count: int) -> list[Batch]:
        self.task.before_draw()
        return [dict(self.task.batch) for _ in range(count)]

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["steps", "memory", "rank"])
    parser.add_argument("--pairs", type=int, default=60, help="turns of each in `steps`")
    parser.add_argument("--precision", default="auto", help="of `steps`")
    parser.add_argument("--layers", type=int, default=4, help="of the model of `steps`")
    parser.add_argument("--width", type=int, default=256, help="of the model of `steps`")
    parser.add_argument("--batch", type=int, default=4, help="samples per rank in `steps`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="of `memory`")
    parser.add_argument("--parameters", type=float, default=16e6, help="of the model of `memory`")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "rank":
        with join_ranks() as ranks:
            found = {"steps": steps_rank, "memory": memory_rank}[arguments.work](arguments, ranks)
            if ranks.is_main:
                print("RESULT " + json.dumps(found), flush=True)
        leave(0)
    print(f"{machine()}\n", flush=True)
    with TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        {"steps": steps, "memory": memory}[arguments.part](arguments)


def steps(arguments: argparse.Namespace) -> None:
    print("| processes | ZeRO | precision | bare step ms | engine's step ms | ratio | 95 % of it | of the sums |")
    print("|---|---|---|---|---|---|---|---|")
    gpus = torch.cuda.device_count() or max(ranks for ranks, _ in STEPS_AT)
    for ranks, stage in STEPS_AT:
        if ranks > gpus:
            continue
        found = in_ranks("steps", arguments, ranks, stage, arguments.precision)
        ratios = [engine / bare for engine, bare in found["pairs"]]
        engine, bare = (median(turn) * 1e3 for turn in zip(*found["pairs"], strict=True))
        whole = sum(engine for engine, _ in found["pairs"]) / sum(bare for _, bare in found["pairs"])
        low, high = interval(ratios)
        cells = [ranks, stage, found["precision"], f"{bare:.1f}", f"{engine:.1f}"]
        cells += [f"**{median(ratios):.3f}**", f"{low:.3f} to {high:.3f}", f"{whole:.3f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\nLoad average afterwards {os.getloadavg()[0]:.1f}.")


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Of the median, from order statistics: no assumption about how the values are distributed."""
    values, n = sorted(values), len(values)
    below, cut = 0.0, 0  # the chance that the median lies below the value number ``cut``
    while cut < n // 2 and below + comb(n, cut) / 2**n <= (1 - level) / 2:
        below += comb(n, cut) / 2**n
        cut += 1
    return values[max(0, cut - 1)], values[n - max(1, cut)]


def steps_rank(arguments: argparse.Namespace, ranks: Ranks) -> dict:
    """Seconds of the engine's step and of the bare one, pair by pair."""
    config = NextBlockConfig(
        layers=arguments.layers, width=arguments.width, heads=4, mlp_width=3 * arguments.width, block=BLOCK, dropout=0
    )
    torch.manual_seed(0)
    model = NextBlockPrior(config, CODEBOOK, GRID)
    other = copy.deepcopy(model)
    ids = torch.randint(CODEBOOK, (arguments.batch, model.order.tokens), generator=torch.Generator().manual_seed(1))
    task = BenchmarkTask(model, {"ids": ids.to(ranks.device)}, cross_entropy)
    training = TrainingConfig(
        steps=WARM_UP + arguments.pairs + 1,
        batch_size=arguments.batch * ranks.size,
        precision=arguments.precision,
        zero_stage=arguments.stage,
        schedule={"kind": "constant"},
        validate_every=NEVER,
        picture_every=NEVER,
        checkpoint={"every": NEVER},
    )
    trainer = trainer_of(task, training, arguments.folder, ranks)
    bare = bare_engine(trainer, other, training)
    pairs: list[tuple[float, float]] = []
    resumed: list[float] = []  # when the engine last got a batch

    def bare_turn() -> None:
        at = together(ranks)
        engine_s = at - resumed[-1] if resumed else None
        begun = together(ranks)
        bare.backward(cross_entropy(bare, task.batch))
        bare.step()
        bare_s = together(ranks) - begun
        if engine_s is not None:
            pairs.append((engine_s, bare_s))
        resumed.append(together(ranks))

    task.before_draw = bare_turn
    trainer.train()
    precision = str(trainer.learner.dtype).removeprefix("torch.")
    bare.destroy()
    trainer.engine.destroy()
    return {"precision": precision, "pairs": pairs[WARM_UP:]}


def cross_entropy(forward: Callable, batch: Batch) -> Tensor:
    logits = forward(batch["ids"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["ids"][:, -logits.shape[1] :].flatten())


def bare_engine(trainer: Trainer, model: nn.Module, training: TrainingConfig):
    """What a person writes who uses DeepSpeed alone, with the DeepSpeed config that the engine made."""
    import deepspeed

    config = copy.deepcopy(trainer.engine._config._param_dict)
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, training.optimizer), config=config)
    engine.train()
    return engine


def trainer_of(task: Task, training: TrainingConfig, folder: Path, ranks: Ranks) -> Trainer:
    run = Run(folder)
    if ranks.is_main:
        run.update_status(kind="benchmark", state="running")
    ranks.barrier()
    return Trainer(task, training, run, ranks, {}, seed=1)


def together(ranks: Ranks) -> float:
    """The time at which the slowest rank, and its GPU, is here."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    ranks.barrier()
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def memory(arguments: argparse.Namespace) -> None:
    print("| ranks | precision | ZeRO | textbook | after a step | most during a step | when | besides, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        for precision, stage in MEMORY_AT:
            found = in_ranks("memory", arguments, ranks, stage, precision)
            large, small = found["large"], found["small"]
            more = large["parameters"] - small["parameters"]
            each = {name: (size - small["bytes"][name]) / more for name, size in large["bytes"].items()}
            when = max(each, key=each.get)
            fixed = large["bytes"][when] - each[when] * large["parameters"]
            cells = [ranks, precision, stage, f"{textbook(precision, stage, ranks):.2f}"]
            cells += [f"{each['after a step']:.2f}", f"{each[when]:.2f}", when, f"{fixed / 1e6:,.0f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\nBytes per parameter of the rank that has most, from {large['parameters']:,} and {small['parameters']:,}.")


def textbook(precision: str, stage: int, ranks: int) -> float:
    """Bytes per parameter and rank: parameters and gradients in the precision, gradients accumulated in fp32; Adam's
    two moments, and in bf16 the fp32 weights, as Rajbhandari et al. 2020 (arXiv:1910.02054) divide them. ZeRO-0 has
    fp32 weights in any precision."""
    parameters, gradients, optimizer = (4, 4, 8) if precision == "fp32" or stage == 0 else (2, 4, 12)
    return (
        parameters / (ranks if stage >= 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


def memory_rank(arguments: argparse.Namespace, ranks: Ranks) -> dict:
    sizes = {"large": arguments.parameters, "small": arguments.parameters / 4}
    return {name: measured(size, ranks, arguments, arguments.folder / name) for name, size in sizes.items()}


def measured(parameters: float, ranks: Ranks, arguments: argparse.Namespace, folder: Path) -> dict:
    """Bytes of live tensors on the rank that has most, before and at each moment of the third step."""
    gc.collect()
    width = round((parameters / 8) ** 0.5)
    before = live_bytes(None)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)))
    count = sum(p.numel() for p in model.parameters())
    batch = {"x": torch.ones(1, width, device=ranks.device)}
    task = BenchmarkTask(model, batch, squares)
    training = TrainingConfig(
        steps=4,
        batch_size=ranks.size,
        precision=arguments.precision,
        zero_stage=arguments.stage,
        validate_every=NEVER,
        picture_every=NEVER,
        checkpoint={"every": NEVER},
    )
    found: dict[str, int] = {}

    def look(moment: str) -> Callable[..., None]:
        def looked(*_) -> None:
            if trainer.step == 2:  # Adam's moments are there
                found[moment] = max(found.get(moment, 0), live_bytes(model) - before)

        return looked

    for parameter in model.parameters():  # before DeepSpeed's hooks, which take the gradient away
        parameter.register_post_accumulate_grad_hook(look("in backward"))
    trainer = trainer_of(task, training, folder, ranks)
    task.before_draw, task.after_forward = look("after a step"), look("after forward")
    trainer.engine.basic_optimizer.register_step_pre_hook(look("before the optimizer"))
    trainer.engine.basic_optimizer.register_step_post_hook(look("after the optimizer"))
    engine_step = trainer.engine.step

    def step(*given):
        look("after backward")()
        return engine_step(*given)

    trainer.engine.step = step
    trainer.train()
    trainer.engine.destroy()
    everywhere = ranks.gather(found)
    return {"parameters": count, "bytes": {name: max(rank[name] for rank in everywhere) for name in found}}


def squares(forward: Callable, batch: Batch) -> Tensor:
    x = batch["x"]
    return forward(x.to(next(p for p in forward.parameters()).dtype)).float().square().mean()


def live_bytes(model: nn.Module | None) -> int:
    """Of the storages behind all tensors that Python knows, each once, and of gradients."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    tensors += [p.grad for p in (model.parameters() if model is not None else ()) if p.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def in_ranks(work: str, arguments: argparse.Namespace, ranks: int, stage: int, precision: str) -> dict:
    """The result of ``work`` in so many processes of its own: DeepSpeed remembers, for as long as a process lives, that
    one engine in it used autocast."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.engine", "rank", "--work", work]
    command += ["--stage", str(stage), "--precision", precision]
    command += ["--folder", str(arguments.folder / f"{work}_{ranks}_{stage}_{precision}")]
    for name in ("pairs", "layers", "width", "batch", "parameters"):
        command += [f"--{name}", str(getattr(arguments, name))]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // ranks))
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    try:
        results = [line.removeprefix("RESULT ") for line in processes[0].stdout if line.startswith("RESULT ")]
        for process in processes:
            if process.wait() != 0:
                raise SystemExit(f"{work}: a rank ended with {process.returncode}")
        return json.loads(results[0])
    finally:
        for process in processes:
            process.kill()  # those that are left where one has failed


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    total = psutil.virtual_memory().total / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return (
        f"{date.today()}, {os.cpu_count()} cores, {total:.0f} GiB, {device}, load average {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    main()
