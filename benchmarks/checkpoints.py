"""What checkpoints cost: the time that training stands still, and a large one for real.

    .venv/bin/python -m benchmarks.checkpoints stall [--folder DIR] [--parameters N] [--rounds N]
    .venv/bin/python -m benchmarks.checkpoints large [--folder DIR]

Both run two processes on this machine and print markdown.

stall  Background saving against blocking saves of the same checkpoint, in turns in one run. A turn is one save from the
       end of a step to the next: the copy into host memory, and later the marker; or all of it. The first turn of each,
       which allocates the copy, is left out. Beside it, how much slower steps are while a thread writes.
large  NBP-XL (876 M parameters with embeddings) under ZeRO-3, built with ``deepspeed.zero.Init``, in bf16 with
       DeepSpeedCPUAdam: two steps, a blocking save, a third step; a new start that resumes and repeats the third step;
       an export; loading that. Seconds, bytes, and the memory of all processes (RSS, summed, sampled).
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stpredict.exports import PriorExport, export_checkpoint, load_prior
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.training.checkpoint import CheckpointState
from stpredict.training.compiled_op import load_compiled_op
from stpredict.training.config import CheckpointConfig, TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.pieces import Held, owned
from stpredict.training.ranks import Ranks, join_ranks
from stpredict.training.restoring import newest_sound_checkpoint, restore
from stpredict.training.saving import Saver

RANKS = 2
CODEBOOK, GRID = 64_000, (5, 16, 16)  # NBP on UCF-101: 17 frames of 128 x 128
# glibc keeps freed memory of DeepSpeed's many buffers otherwise: 24 instead of 17 bytes a parameter.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["stall", "large", "rank"])
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--parameters", type=float, default=60e6, help="of the model of `stall`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=24, help="of the model of `large`")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "rank":
        PHASES[arguments.phase](arguments)
        return
    print(f"{machine()}\n", flush=True)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = Path(folder)
        {"stall": stall, "large": large}[arguments.part](arguments)


def stall(arguments: argparse.Namespace) -> None:
    turns = in_ranks("stall", arguments)[0]["turns"]
    print("| | blocking s | background s | of it marker s | stall, background / blocking | steps while writing |")
    print("|---|---|---|---|---|---|")
    for number, turn in enumerate(turns, 2):
        print(f"| save {number} | {row(turn)} |")
    print(f"| **median** | {row({name: median(turn[name] for turn in turns) for name in turns[0]})} |")


def row(turn: dict[str, float]) -> str:
    cells = (f"{turn[name]:.3f}" for name in ("blocking", "background", "marker", "ratio"))
    return " | ".join([*cells, f"{turn['slower']:.2f} times a step's time"])


def stall_rank(arguments: argparse.Namespace) -> None:
    with join_ranks() as ranks:
        width = round((arguments.parameters / 8) ** 0.5)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)))
        training = TrainingConfig(steps=1, batch_size=2 * 64, precision="fp32", zero_stage=2)
        engine = build_engine(model, training, torch.float32, ranks.size, 1)
        held = Held("model", model, engine.basic_optimizer, engine)
        savers = {
            name: Saver(
                arguments.folder / name,
                lambda: owned(held.pieces(), ranks.rank, ranks.size),
                CheckpointConfig(keep=1, background=name == "background"),
                ranks,
            )
            for name in ("blocking", "background")
        }
        x = torch.randn(64, width)

        def step() -> float:
            start = time.perf_counter()
            engine.backward(engine(x).square().mean())
            engine.step()
            ranks.barrier()
            return time.perf_counter() - start

        turns = []
        for number in range(arguments.rounds):
            alone = median(step() for _ in range(5))
            blocking = timed(ranks, lambda n=number: savers["blocking"].start(state(n)))
            for _ in range(3):
                step()
            copied = timed(ranks, lambda n=number: savers["background"].start(state(n)))
            during = [step()]
            while ranks.sum(torch.tensor(float(not savers["background"].is_written))).item():
                during.append(step())
            marker = timed(ranks, savers["background"].finish)
            turns.append(
                {
                    "blocking": blocking,
                    "background": copied + marker,
                    "marker": marker,
                    "ratio": (copied + marker) / blocking,
                    "slower": median(during) / alone,
                }
            )
        report(ranks, turns=turns[1:], bytes=savers["background"].bytes)


def timed(ranks: Ranks, action: Callable[[], object]) -> float:
    """Seconds until the slowest rank has done ``action``."""
    ranks.barrier()
    start = time.perf_counter()
    action()
    ranks.barrier()
    return time.perf_counter() - start


def large(arguments: argparse.Namespace) -> None:
    print("| | seconds | memory of all processes, GiB | least available, GiB |")
    print("|---|---|---|---|")
    done = {phase: in_ranks(phase, arguments)[0] for phase in ("save", "resume")}
    checkpoints = arguments.folder / "checkpoints"
    folder, out = newest(checkpoints), arguments.folder / "export"
    in_ranks("export", arguments, ranks=1)
    in_ranks("load", arguments, ranks=1)
    saved, resumed = done["save"], done["resume"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"\n{saved['parameters']:,} parameters; checkpoint {size:,} bytes, {size / saved['parameters']:.2f} each; ")
    print(f"export {sum(file.stat().st_size for file in out.iterdir()):,} bytes.")
    print(f"Losses {saved['losses']}; the third step after the resume: {resumed['losses']}, ", end="")
    print("the same to the bit." if saved["losses"][2:] == resumed["losses"] else "NOT the same.")


def newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step_*"))


def save_rank(arguments: argparse.Namespace) -> None:
    with join_ranks() as ranks, clock(ranks, "built under zero.Init") as lap:
        engine, held, saver = nbp_xl(ranks, arguments)
        lap("two steps")
        losses = [step(engine, ranks, number) for number in range(2)]
        lap("saved, blocking")
        saver.start(state(2, held, engine))
        lap("a third step")
        losses.append(step(engine, ranks, 2))
        lap()
        report(ranks, losses=losses, parameters=sum(p.ds_numel for p in engine.module.parameters()))


def resume_rank(arguments: argparse.Namespace) -> None:
    with join_ranks() as ranks, clock(ranks, "built under zero.Init again") as lap:
        engine, held, saver = nbp_xl(ranks, arguments)
        lap("every byte of the checkpoint verified")
        folder = newest_sound_checkpoint(saver.checkpoints, ranks)
        lap("resumed")
        restore(folder, [held], [], ranks)
        lap("the third step again")
        losses = [step(engine, ranks, 2)]
        lap()
        report(ranks, losses=losses)


def export_rank(arguments: argparse.Namespace) -> None:
    with clock(None, "exported") as lap:
        export_checkpoint(newest(arguments.folder / "checkpoints"), arguments.folder / "export")
        lap()


def load_rank(arguments: argparse.Namespace) -> None:
    with clock(None, "export loaded") as lap:
        load_prior(arguments.folder / "export")
        lap()


def nbp_xl(ranks: Ranks, arguments: argparse.Namespace):
    """The engine, what it holds, and a saver that blocks: a second copy of the state would not fit."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    load_compiled_op()
    deepspeed.init_distributed(torch.distributed.get_backend())
    small = 20_000_000
    config = {
        "train_batch_size": ranks.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": small,
            "stage3_prefetch_bucket_size": small,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": small,
            "sub_group_size": small,
        },
        "steps_per_print": 10**9,
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = NextBlockPrior(NextBlockConfig(layers=arguments.layers, dropout=0), CODEBOOK, GRID)
    for layer in model.layers:
        layer.forward = recomputed(layer.forward)
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    held = Held("model", model, engine.basic_optimizer, engine)
    mine = lambda: owned(held.pieces(), ranks.rank, ranks.size)  # noqa: E731
    return engine, held, Saver(arguments.folder / "checkpoints", mine, CheckpointConfig(background=False), ranks)


def recomputed(forward: Callable) -> Callable:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def step(engine, ranks: Ranks, number: int) -> float:
    """One optimizer step on a sequence of random tokens per rank; its loss."""
    generator = torch.Generator().manual_seed(number * ranks.size + ranks.rank)
    ids = torch.randint(CODEBOOK, (1, engine.module.order.tokens), generator=generator)
    logits = engine(ids)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -logits.shape[1] :].flatten())
    engine.backward(loss)
    engine.step()
    return ranks.sum(loss.detach().clone()).item() / ranks.size


def state(step: int, held: Held | None = None, engine=None) -> CheckpointState:
    export = {}
    if engine is not None:
        config = PriorExport(
            step=step, codebook_size=CODEBOOK, grid=GRID, tokenizer_fingerprint="none", model=engine.module.config
        )
        export = config.model_dump(mode="json")
    return CheckpointState(
        step=step,
        samples_consumed={},
        quarantined={},
        world_size=RANKS,
        zero_stage=3 if engine is not None else 2,
        precision="bf16" if engine is not None else "fp32",
        optimizer_steps={"model": step},
        config={},
        export=export,
    )


class clock:  # noqa: N801 (used as a function)
    """Prints a row of the table for each part of a phase: its seconds and the most memory in it."""

    def __init__(self, ranks: Ranks | None, first: str):
        self.ranks, self.name = ranks, first

    def __enter__(self) -> Callable[..., None]:
        self.started, self.memory = time.perf_counter(), Memory() if self._is_main else None
        return self.lap

    def __exit__(self, *_) -> None:
        if self.memory:
            self.memory.close()

    def lap(self, name: str | None = None) -> None:
        if self.ranks:
            self.ranks.barrier()
        if self.memory:
            most, least = self.memory.take()
            seconds = time.perf_counter() - self.started
            print(f"| {self.name} | {seconds:.1f} | {most:.1f} | {least:.1f} |", flush=True)
        self.name, self.started = name, time.perf_counter()

    @property
    def _is_main(self) -> bool:
        return self.ranks is None or self.ranks.is_main


class Memory:
    """Samples, ten times a second, the resident memory of all processes of this benchmark and what the machine has
    left, in GiB."""

    def __init__(self):
        self.processes = psutil.Process(os.getppid()).children(recursive=True)
        self.take()
        self._over = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self._thread.start()

    def take(self) -> tuple[float, float]:
        """The most resident and the least available since the last call."""
        found = getattr(self, "most", 0.0), getattr(self, "least", 0.0)
        self.most, self.least = 0.0, float("inf")
        self._look()
        return max(found[0], self.most), min(found[1], self.least)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.1):
            self._look()

    def _look(self) -> None:
        resident = sum(process.memory_info().rss for process in self.processes if process.is_running())
        self.most = max(self.most, resident / 2**30)
        self.least = min(self.least, psutil.virtual_memory().available / 2**30)


PHASES = {
    "stall": stall_rank,
    "save": save_rank,
    "resume": resume_rank,
    "export": export_rank,
    "load": load_rank,
}


def report(ranks: Ranks, **found: object) -> None:
    if ranks.is_main:
        print("RESULT " + json.dumps(found), flush=True)


def in_ranks(phase: str, arguments: argparse.Namespace, ranks: int = RANKS) -> list[dict]:
    """Runs a phase in ``ranks`` processes; passes on what they print, and returns their results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.checkpoints", "rank", "--phase", phase]
    command += ["--folder", str(arguments.folder), "--parameters", str(arguments.parameters)]
    command += ["--rounds", str(arguments.rounds), "--layers", str(arguments.layers)]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment = {**os.environ, **MALLOC, **(shared if ranks > 1 else {"OMP_NUM_THREADS": "2"}), **place}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    results = []
    for process in processes:
        for line in process.stdout:
            if line.startswith("RESULT "):
                results.append(json.loads(line.removeprefix("RESULT ")))
            elif line.startswith("|"):
                print(line, end="", flush=True)
        if process.wait() != 0:
            raise SystemExit(f"phase {phase}: a rank ended with {process.returncode}")
    return results


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "safetensors"))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{date.today()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.processor() or platform.machine()}, "
        f"load average {os.getloadavg()[0]:.1f}, {packages}"
    )


if __name__ == "__main__":
    main()
