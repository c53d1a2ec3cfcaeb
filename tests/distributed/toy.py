"""A task small enough to write out by hand, and a way to run it in several processes.

Sample n is a vector drawn from seed n with a mask of 1 to 8 valid entries, so that every split of a batch has
other counts. Run as ``python toy.py OUT`` with a JSON list of trials on standard input, in every rank.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.config import Config
from launcher.rank import leave
from stpredict.layers.batch_norm import BatchNorm
from stpredict.run import Run
from stpredict.training import precision
from stpredict.training.config import InitFromConfig, TrainingConfig
from stpredict.training.determinism import make_deterministic
from stpredict.training.engine import Trainer
from stpredict.training.ranks import join_ranks
from stpredict.training.signals import Preempted
from stpredict.training.task import Batch, Share, Task

ROOT = Path(__file__).parents[2]
WIDTH = 8


class ToyExport(Config):
    step: int = 0


class ToyModel(nn.Module):
    """``rich`` adds what DeepSpeed's checkpoints leave out, all of it felt in the output: a frozen layer and two
    buffers that every training step changes, one of them by putting a new tensor in its place. ``normalised`` puts a
    BatchNorm between its layers."""

    def __init__(self, dropout: float, rich: bool = False, normalised: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mark", torch.zeros(3))
        self.norm = BatchNorm(16) if normalised else nn.Identity()
        self.rich = rich
        if rich:
            self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.register_buffer("level", torch.zeros(()))
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        if self.rich:
            if self.training:
                self.level.lerp_(torch.ones_like(self.level) + 0 * x.detach().sum(), 0.25)  # of a NaN, NaN
                self.steps = self.steps + 1
            x = (self.frozen(x) + self.level + 0.01 * self.steps).to(x.dtype)
        return self.second(self.dropout(self.norm(torch.tanh(self.first(x)))))


def sample(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, WIDTH, generator=generator)
    mask = (torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (), generator=generator)).float()
    return x, y, mask


def stack(numbers: list[int]) -> Batch:
    x, y, mask = map(torch.stack, zip(*map(sample, numbers), strict=True))
    return {"x": x, "y": y, "mask": mask, "weight": torch.ones(len(numbers))}


class ToyBatches:
    """Sample n of the toy set is made from n. What is wrong with those in ``poison``: ``nan`` in the input; a loss that
    is not finite (``loss``), or only its gradient (``gradient``); a truth far off (``spike``)."""

    def __init__(self, share: Share, consumed: int, poison: Mapping[int, str]):
        self.share, self.poison = share, poison
        self.consumed, self.replaced = {"toy": consumed}, 0

    def draw(self, step: int, count: int) -> list[Batch]:
        return [self._next() for _ in range(count)]

    def _next(self) -> Batch:
        first = self.consumed["toy"] + self.share.rank
        numbers = [first + self.share.world_size * i for i in range(self.share.batch_size)]
        self.consumed["toy"] += self.share.world_size * self.share.batch_size
        batch = stack(numbers)
        for place, number in enumerate(numbers):
            match self.poison.get(number):
                case "nan":
                    batch["x"][place, 0] = torch.nan
                case "spike":
                    batch["y"][place] *= 1000
                case "loss" | "gradient" as kind:
                    batch[kind] = torch.ones(())
        return batch

    def close(self) -> None:
        pass


class ToyTask(Task):
    """With ``rich``, a discriminator, its last layer frozen, learns to tell the output from the truth, and the model to
    deceive it."""

    metrics = ("l2",)

    def __init__(
        self,
        dropout: float = 0.0,
        poison: Mapping[int, str] | None = None,
        rich: bool = False,
        normalised: bool = False,
    ):
        self.model = ToyModel(dropout, rich, normalised)
        self.weights = {"l2": 1.0}
        if rich:
            frozen = nn.Linear(1, 1).requires_grad_(False)
            self.discriminator = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1), frozen)
            self.adversarial_weights, self.discriminator_weights = {"deceived": 0.5}, {"told": 1.0}
        self.poison = poison or {}
        self.quarantined = {}

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> "ToyBatches":
        return ToyBatches(share, consumed.get("toy", 0), self.poison)

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        yield stack([10_000 + share.rank])

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = {"l2": float(batch["mask"].sum())}
        return counts | {"deceived": len(batch["x"]), "told": len(batch["x"])} if self.discriminator else counts

    def training_step(self, forward, batch: Batch) -> dict[str, Tensor]:
        output = forward(batch["x"]).float()
        error = (output - batch["y"]) * batch["mask"]
        batch["output"] = output
        sums = {"l2": error.square().sum(), "code": torch.bincount(batch["x"].argmax(1), minlength=WIDTH)}
        if "loss" in batch:
            sums["l2"] = sums["l2"] + torch.inf
        if "gradient" in batch:
            sums["l2"] = sums["l2"] + (0 * output).square().sum().sqrt()
        return sums

    def tokens(self, batch: Batch) -> int:
        return batch["x"].numel()

    def adversarial_step(self, judge, batch: Batch) -> dict[str, Tensor]:
        return {"deceived": F.softplus(-judge(batch["output"])).sum()}

    def discriminator_step(self, forward, batch: Batch, update: int) -> dict[str, Tensor]:
        judged = forward(torch.cat([batch["y"], batch["output"]]))
        true, false = judged.chunk(2)
        return {"told": (F.softplus(-true) + F.softplus(false)).sum()}

    def validation_step(self, forward, batch: Batch) -> dict[str, Tensor]:
        return {**self.training_step(forward, batch), "entries": batch["mask"].sum()}

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {"l2": float(sums["l2"] / sums["entries"])}

    def picture(self, forward, batch: Batch) -> np.ndarray:
        forward(batch["x"])
        return np.zeros((2, 4, 4, 3), np.uint8)

    def export_config(self) -> ToyExport:
        return ToyExport()


def toy_task(trial: dict) -> Task:
    poison = {int(number): kind for number, kind in trial.get("poison", {}).items()}
    if "adversarial" in trial:
        from tests.distributed.adversarial_toy import AdversarialToy  # which imports this module

        return AdversarialToy(**trial["adversarial"], poison=poison)
    options = {name: trial[name] for name in ("dropout", "rich", "normalised") if name in trial}
    return ToyTask(poison=poison, **options)


def main(out: Path, build: Callable[[dict], Task] = toy_task) -> None:
    """Runs every trial of the task that ``build`` makes for it; rank 0 prints a JSON line for each."""
    given = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else sys.stdin.read()
    with join_ranks() as ranks:
        for trial in json.loads(given):
            torch.manual_seed(0)
            if trial["training"].get("precision") == "fp16" and ranks.device.type == "cpu":
                _compute_in_fp16()
            task = build(trial)
            task.model.mark.fill_(ranks.rank)
            if trial.get("quarantine"):
                task.quarantined[f"met by rank {ranks.rank}"] = "its worker died"
            training = TrainingConfig.model_validate(trial["training"])
            if training.deterministic:
                make_deterministic()
            run = Run(out / trial["run"])
            if ranks.is_main:
                run.update_status(kind="toy", state="running")
                if "copy_of" in trial:
                    shutil.copytree(Run(out / trial["copy_of"]).checkpoints, run.checkpoints)
            ranks.barrier()
            identity = {"training.optimizer.lr": training.optimizer.lr, **trial.get("identity", {})}
            init_from = InitFromConfig(**trial["init_from"]) if "init_from" in trial else None
            trainer = Trainer(task, training, run, ranks, identity, 1, trial.get("force", False), init_from)
            started = ranks.gather(_buffers(task))
            if trial.get("resave"):  # what was loaded, as it stands
                trainer.saver.checkpoints, trainer.checkpointing.saved_step = run.path / "resaved", -1
                trainer.checkpointing.save(last=True)
                trainer.watchdog.stop()
                continue
            if "refuse" in trial:
                _refuse(trainer, trial["refuse"])
            begun = ranks.gather({name: buffer.tolist() for name, buffer in task.model.named_buffers()})
            if ranks.rank in trial.get("delay", {}).get("ranks", ()):
                _delay(task, **trial["delay"])
            if "without" in trial:
                _leave_out(task, *trial["without"])
            if "lose_after" in trial:
                _lose_after(trainer, trial["lose_after"])
            changed = _watched(trainer) if trial.get("watch_changes") else []
            if trial.get("unequal"):
                task.model.mark.fill_(ranks.rank)
            until, error = trial.get("until"), None
            if until is not None and ranks.rank == ranks.size - 1:
                _signal_after(trainer, until)
            try:
                trainer.train()
            except (Preempted, LostError) as stopped:
                error = str(stopped)
            marks = [torch.empty_like(task.model.mark) for _ in range(ranks.size)]
            torch.distributed.all_gather(marks, task.model.mark)
            if ranks.is_main:
                found = {"step": trainer.step, "stopped": error, "marks": [m.tolist() for m in marks]}
                found["buffers"], found["buffers_after"] = started, _buffers(task)
                found["unequal"] = sorted(trainer.checkpointing.unequal_buffers)
                found["begun"] = begun  # each rank's buffers before the first step
                found["changed"] = changed
                print(json.dumps(found | {"quarantined": task.quarantined}))


def _buffers(task: Task) -> dict[str, list]:
    return {name: [str(buffer.dtype), buffer.tolist()] for name, buffer in task.model.named_buffers()}


def _compute_in_fp16() -> None:
    """As CPUs of today do; on others torch does it slowly, and DeepSpeed refuses."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = precision.cpu_fp16_is_real = lambda: True


def repeatable(row: dict) -> dict:
    """What of a line of metrics.jsonl depends neither on clocks nor on the machine."""
    measured = ("time", "data_wait_share", "tflops", "mfu")
    return {
        name: value
        for name, value in row.items()
        if name not in measured and not name.startswith("step_s") and not name.endswith(("_per_s", "_gb"))
    }


class LostError(Exception):
    """This training ends as if all its processes were killed."""


def _lose_after(trainer: Trainer, steps: int) -> None:
    """After going back to a checkpoint and so many steps in all."""
    learner_step = trainer.learner.step

    def step(number: int, *arguments):
        if trainer.learner.guards.state.rollbacks and number == steps:
            raise LostError(f"at step {number}")
        return learner_step(number, *arguments)

    trainer.learner.step = step


def _leave_out(task: ToyTask, start: int, count: int) -> None:
    """The data of ``task`` has no samples ``start`` and ``count - 1`` following."""
    training_batches = task.training_batches

    def batches(share: Share, consumed: Mapping[str, int]):
        made = training_batches(share, consumed)
        draw = made.draw

        def past(step: int, number: int) -> list[Batch]:
            if made.consumed["toy"] == start:
                made.consumed["toy"] += count
            return draw(step, number)

        made.draw = past
        return made

    task.training_batches = batches


def _refuse(trainer: Trainer, step: int) -> None:
    """The guards refuse ``step``, from 0, whatever it is like."""
    refuses = trainer.learner.guards.refuses
    trainer.learner.guards.refuses = lambda *values: refuses(*values) or trainer.step == step


def _watched(trainer: Trainer) -> list[bool]:
    """Of every step, as it is made: whether a bit of the state changed on any rank."""
    learner_step, changed = trainer.learner.step, []

    def step(*arguments):
        before = [piece.tensor.clone() for piece in trainer.learner.owned()]
        result = learner_step(*arguments)
        now = [piece.tensor for piece in trainer.learner.owned()]
        differ = not all(map(torch.equal, before, now))
        changed.append(any(trainer.ranks.gather(differ)))
        return result

    trainer.learner.step = step
    return changed


def _delay(task: ToyTask, ranks: list[int], how: str, s: float = 0.0, from_call: int = 0) -> None:
    """Before every forward pass of training (``how`` forward), or whenever data is drawn, from that call on, this
    process sleeps ``s`` seconds; it is stopped, killed, or sleeps without letting any other thread run."""
    calls = 0

    def before(function):
        def delayed(*arguments):
            nonlocal calls
            if calls >= from_call:
                match how:
                    case "stop":
                        time.sleep(1)  # time to say where it is
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "hold":
                        time.sleep(1)
                        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the launcher's would wake it
                        ctypes.PyDLL(None).sleep(int(s))
                    case _:
                        time.sleep(s)
            calls += 1
            return function(*arguments)

        return delayed

    if how == "forward":
        task.training_step = before(task.training_step)
    else:
        training_batches = task.training_batches

        def batches(*arguments):
            made = training_batches(*arguments)
            made.draw = before(made.draw)
            return made

        task.training_batches = batches


def _signal_after(trainer: Trainer, step: int) -> None:
    """This process, and no other rank, gets SIGUSR2 when it has done ``step``."""
    learner_step = trainer.learner.step

    def step_then_signal(number: int, *arguments):
        result = learner_step(number, *arguments)
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        return result

    trainer.learner.step = step_then_signal


def run_ranks(
    trials: list[dict], out: Path, ranks: int, timeout_s: float = 500, script: str = __file__, cuda: bool = False
) -> list[dict]:
    """Runs the trials by ``script`` in ``ranks`` processes, on CPU unless ``cuda``; returns rank 0's lines.
    AssertionError with the log if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}),
        }
        command = [sys.executable, script, str(out)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    text = json.dumps(trials)
    for process in processes:
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
    try:
        with ThreadPoolExecutor(ranks) as readers:  # all at once: a rank whose pipe is full would stop the others
            results = list(readers.map(lambda process: process.communicate(timeout=timeout_s), processes))
    finally:
        for process in processes:
            process.kill()  # those that are left, where one took too long
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(line) for line in results[0][0].splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # as every rank ends: Python's own way out aborts once in a while
