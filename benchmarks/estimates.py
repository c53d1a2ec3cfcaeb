"""How well `stpredict estimate` tells the memory of a training: what it says beside what a training takes.

    .venv/bin/python -m benchmarks.estimates [--ranks 1 2] [--models NAME...] [--stages N...]

Starts processes on this machine and prints markdown. Small priors, tokenizers and forecasters are trained for three
steps by the real engine, at every ZeRO stage and precision, with activation checkpointing and without; what they take
is the most in the third step: on a CPU bytes of live tensors, counted operator by operator; on CUDA what torch has
allocated. The estimate is for the same device. Bytes do not depend on load. On a CPU DeepSpeed's buckets are made
small (BUCKET), or larger than the models (WHOLE): 2 GB of them would hide everything else. The column checkpoint is
the ratio of the bytes that a checkpoint is said to have to those of one that was written.
"""

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import machine
from data_pipeline.config import ClipConfig, ClipDataConfig
from launcher.rank import leave
from stpredict.config import flat
from stpredict.estimates.disk import disk_of
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.estimates.memory import Memory, MemoryEstimator
from stpredict.estimates.planned import Planned, plan_training
from stpredict.estimates.shapes import modules
from stpredict.jobs.config import ForecasterJobConfig, PriorJobConfig, TokenizerJobConfig
from stpredict.training.checkpoint import CheckpointState, bytes_of, folder_of
from stpredict.training.config import TrainingConfig
from stpredict.training.learner import Learner
from stpredict.training.ranks import Ranks, join_ranks
from stpredict.training.saving import Saver
from stpredict.training.task import to_device

BUCKET = 100_000  # elements
WHOLE = 10_000_000  # more than any model here has
SGD = {"kind": "sgd", "weight_decay": 0.1}
OFFLOADED = {"offload": {"optimizer": "cpu"}, "checkpoint": {"background": False}}
STAGES, PRECISIONS, POLICIES = (0, 1, 2, 3), ("fp32", "bf16"), ("none", "selective", "layers")
MODELS: dict[str, dict[str, Any]] = {
    "prior": {
        "latent": {"grid": (4, 8, 8), "codebook_size": 1024},
        "model": {"layers": 6, "width": 128, "heads": 4, "mlp_width": 384, "block": (1, 1, 8)},
    },
    # Beside so few tokens weights, gradients and buckets are nearly all.
    "weights": {
        "latent": {"grid": (2, 2, 8), "codebook_size": 1024},
        "model": {"layers": 6, "width": 128, "heads": 4, "mlp_width": 384, "block": (1, 1, 8)},
    },
    "tokenizer": {
        "size": (32, 32),
        "frames": 9,
        "model": {
            "channels": (32, 64, 96),
            "blocks": (1, 1, 2),
            "middle_blocks": 2,
            "strides": ((1, 2, 2), (2, 2, 2)),
            "groups": 8,
        },
    },
}
MODELS["forecaster"] = {
    "model": {
        "kind": "simvp",
        "input_frames": 4,
        "output_frames": 4,
        "size": (32, 32),
        "hid_S": 16,
        "hid_T": 64,
        "N_S": 2,
        "N_T": 3,
        "translator": {"kind": "gsta", "drop_path": 0.1},
    },
}
# A field, and a horizon for which the network is gone through twice.
MODELS["forecaster_svq"] = {
    "data": {"scaling": {"kind": "standard"}},
    "model": {
        **MODELS["forecaster"]["model"],
        "channels": 2,
        "output_frames": 8,
        "translator": {"kind": "convnext"},
        "quantizer": {"kind": "svq", "codebook_size": 2000},
    },
}
JUDGED = {
    "perceptual": {"network": {"kind": "random_features"}},
    "adversarial": {"lecam": 0.001, "discriminator": {"channels": 32, "layers": 2, "groups": 8}},
}
R1 = {"adversarial": {**JUDGED["adversarial"], "r1": 10.0, "r1_every": 2}}
MODELS["tokenizer_gan"] = {
    "size": (32, 32),
    "frames": 9,
    "model": {
        "channels": (16, 32, 32),
        "blocks": (1, 1, 1),
        "middle_blocks": 1,
        "strides": ((1, 2, 2), (2, 2, 2)),
        "groups": 8,
    },
    "loss": JUDGED,
}
MODELS["adversarial tokenizer"] = MODELS["tokenizer"] | {
    "loss": {"perceptual": {"network": {"kind": "random_features"}}, "adversarial": {"r1": 1, "lecam": 0.001}}
}
# A GPU has room for models beside which its blocks of 512 bytes and the libraries' workspaces are small.
LARGE: dict[str, dict[str, Any]] = {
    "prior": {
        "latent": {"grid": (5, 16, 16), "codebook_size": 64000},
        "model": {"layers": 12, "width": 1024, "heads": 16, "mlp_width": 2816, "block": (1, 1, 16)},
    },
    "weights": {
        "latent": {"grid": (2, 1, 16), "codebook_size": 64000},
        "model": {"layers": 12, "width": 1024, "heads": 16, "mlp_width": 2816, "block": (1, 1, 16)},
    },
    "tokenizer": {"size": (128, 128), "frames": 17, "model": {}},
}
LARGE["forecaster"] = {"model": {"kind": "simvp", "translator": {"kind": "gsta", "drop_path": 0.1}}}
LARGE["forecaster_svq"] = {
    "data": {"scaling": {"kind": "standard"}},
    "model": {
        **{"kind": "simvp", "input_frames": 12, "output_frames": 24, "size": (32, 64)},
        **{"hid_S": 32, "hid_T": 256, "N_S": 2, "N_T": 8},
        "translator": {"kind": "convnext"},
        "quantizer": {"kind": "svq"},
    },
}
LARGE["adversarial tokenizer"] = LARGE["tokenizer"] | {"loss": MODELS["adversarial tokenizer"]["loss"]}
LARGE["tokenizer_gan"] = {**LARGE["tokenizer"], "loss": {**JUDGED, "adversarial": {}}}
MICRO_BATCH = {
    **{"prior": 4, "weights": 1, "tokenizer": 2, "tokenizer_gan": 2, "adversarial tokenizer": 2},
    **{"forecaster": 4, "forecaster_svq": 4},
}


def bucket(elements: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"reduce_bucket_size": elements, **more}}


def fixed(precision: str, stage: int) -> dict[str, Any]:
    return {"precision": precision, "zero_stage": stage}


def trials(models: list[str], stages: list[int]) -> Iterator[dict[str, Any]]:
    """Settings of each training: ``model``, and what is other than the defaults under ``training`` and ``loss``."""
    for model in models:
        for precision in PRECISIONS:
            for stage in stages:
                # Between 1 and 3 the stage changes nothing of what is kept for the backward pass.
                for policy in POLICIES if stage in (0, 3) else POLICIES[:1]:
                    training = {
                        "precision": precision,
                        "zero_stage": stage,
                        "activation_checkpointing": {"policy": policy},
                    }
                    yield {"model": model, "training": training}
                extra = {"precision": precision, "zero_stage": stage, "ema_decay": 0.99}
                yield {"model": model, "accumulation": 2, "training": extra}
                if model == "tokenizer_gan":
                    adaptive = {"discriminator": {"adaptive_weight": True}}
                    yield {"model": model, "training": {**fixed(precision, stage), **adaptive}}
                    yield {"model": model, "loss": R1, "training": fixed(precision, stage)}
                if model == "weights" and stage > 0:
                    yield {"model": model, "training": {**fixed(precision, stage), "deepspeed": bucket(WHOLE)}}
                if model == "weights":
                    yield {"model": model, "training": {**fixed(precision, stage), "optimizer": SGD}}
                if model == "weights" and stage > 0:
                    yield {"model": model, "training": {**fixed(precision, stage), **OFFLOADED}}


def planned_training(trial: Mapping[str, Any], ranks: int, cuda: bool) -> Planned:
    sizes = (LARGE if cuda else MODELS)[trial["model"]]
    micro_batch = trial.get("micro_batch", MICRO_BATCH[trial["model"]])
    training = {
        "steps": 4,
        "batch_size": micro_batch * trial.get("accumulation", 1) * ranks,
        "micro_batch_size": micro_batch,
        "compile": False,
        **trial["training"],
    }
    if cuda:  # where the default bucket is larger than the models
        training.pop("deepspeed", None)
    else:
        training.setdefault("deepspeed", bucket(BUCKET))
    common = {"run": "(none)", "training": training}
    match trial["model"]:
        case "prior" | "weights":
            data = {"latents": "(none)"}
            return plan_training(PriorJobConfig(**common, **sizes, data=data, tokenizer="(none)"))
        case "forecaster" | "forecaster_svq":
            data = {"shards": "(none)", **sizes.get("data", {})}
            return plan_training(ForecasterJobConfig(**common, data=data, model=sizes["model"]))
        case _:
            clip = ClipConfig(frames=sizes["frames"], size=sizes["size"])
            data = ClipDataConfig(shards="(none)", clip=clip)
            loss = sizes.get("loss", {}) | trial.get("loss", {})
            return plan_training(TokenizerJobConfig(**common, data=data, model=sizes["model"], loss=loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="default: 1 2; on CUDA 1 and all GPUs")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        with join_ranks() as ranks:
            for trial in json.loads(sys.stdin.read()):
                found = measured(trial, ranks)
                if ranks.is_main:
                    print("RESULT " + json.dumps(found), flush=True)
        leave(0)
    gpus = torch.cuda.device_count()
    print(f"{machine()}\n")
    print("| ranks | model | precision | ZeRO | recomputed | said MB | measured MB | ratio | most in | checkpoint |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    ratios, on_disk = [], []
    for ranks in arguments.ranks or (sorted({1, gpus}) if gpus else [1, 2]):
        wanted = list(trials(arguments.models, arguments.stages))
        for trial, found in zip(wanted, measure(wanted, ranks), strict=True):
            estimate = estimated(trial, ranks, cuda=gpus > 0)
            said = in_tensors(trial, estimate, cuda=gpus > 0)
            ratios.append(said / found["memory"])
            on_disk.append(estimated_checkpoint(trial, ranks, cuda=gpus > 0) / found["checkpoint"])
            training = trial["training"]
            cells = [ranks, trial["model"], training["precision"], training["zero_stage"], told(trial)]
            cells += [
                f"{said / 1e6:.2f}",
                f"{found['memory'] / 1e6:.2f}",
                f"{ratios[-1]:.3f}",
                estimate.moment,
            ]
            cells.append(f"{on_disk[-1]:.4f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    near = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f"\nWithin 15 %: {near} of {len(ratios)}; from {min(ratios):.3f} to {max(ratios):.3f}.")
    print(f"Checkpoints' sizes: from {min(on_disk):.4f} to {max(on_disk):.4f} of the measured.")


def told(trial: Mapping[str, Any]) -> str:
    """What is particular about it."""
    training = trial["training"]
    found = [training.get("activation_checkpointing", {}).get("policy", "none")]
    found += [f"{trial['accumulation']} micro-batches"] if "accumulation" in trial else []
    found += ["R1"] if trial.get("loss") == R1 else []
    names = {
        "discriminator": "adaptive weight",
        "ema_decay": "averages",
        "deepspeed": "one bucket",
        "optimizer": "SGD",
        "offload": "offloaded",
    }
    return ", ".join([*found, *(name for key, name in names.items() if key in training)])


def in_tensors(trial: Mapping[str, Any], estimate: Memory, cuda: bool) -> int:
    """Bytes that are counted as ``measured`` does: on a CPU what is offloaded is where the rest is."""
    return estimate.total + (estimate.host if "offload" in trial["training"] and not cuda else 0)


_estimators: dict[tuple, MemoryEstimator] = {}


def estimated(trial: Mapping[str, Any], ranks: int, cuda: bool = False) -> Memory:
    planned = planned_training(trial, ranks, cuda)
    key = (trial["model"], cuda, str(trial.get("loss")), str(planned.config.training.discriminator))
    estimator = _estimators.setdefault(key, MemoryEstimator(planned, "cuda" if cuda else "cpu"))
    training = planned.config.training
    return estimator.of(training, ranks, training.micro_batch_size)


def estimated_checkpoint(trial: Mapping[str, Any], ranks: int, cuda: bool = False) -> int:
    planned = planned_training(trial, ranks, cuda)
    return disk_of(planned, planned.config.training, ranks).checkpoint


def measure(wanted: list[dict[str, Any]], ranks: int) -> Iterator[dict[str, int]]:
    """``measured`` of each trial, as they come. Starts the ranks once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "benchmarks.estimates", "--rank"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE if rank == 0 else subprocess.DEVNULL}
        folder = Path(__file__).parent.parent
        processes.append(subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes))
    try:
        for process in processes:
            process.stdin.write(json.dumps(wanted))
            process.stdin.close()
        for line in processes[0].stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
        for process in processes:
            if process.wait() != 0:
                raise SystemExit(f"a rank ended with {process.returncode}")
    finally:
        for process in processes:
            process.kill()  # those that are left where one has failed


def measured(trial: Mapping[str, Any], ranks: Ranks) -> dict[str, int]:
    """Bytes: of ``memory`` on the rank that has most, and of the ``checkpoint`` that all write together."""
    cuda = ranks.device.type == "cuda"
    planned = planned_training(trial, ranks.size, cuda)
    training: TrainingConfig = planned.config.training
    gc.collect()
    live = LiveBytes()
    before = torch.cuda.memory_allocated() if cuda else 0
    with live:
        task = planned.task
        for module in modules(task):
            made_real(module)
        learner = Learner(task, training, ranks)
        for step in range(3):
            batches = [
                to_device(planned.batch(training.micro_batch_size, "cpu"), ranks.device)
                for _ in range(trial.get("accumulation", 1))
            ]
            for batch in batches:
                for value in batch.values():
                    if torch.is_tensor(value):
                        value.zero_()
            counts: dict[str, float] = {}
            for batch in batches:
                for name, count in task.counts(batch).items():
                    counts[name] = counts.get(name, 0.0) + count * ranks.size
            live.peak = live.bytes
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            learner.step(step, batches, counts)
        most = torch.cuda.max_memory_allocated() - before if cuda else live.peak
    found = {"memory": max(ranks.gather(most)), "checkpoint": _checkpoint(learner, ranks)}
    learner.engine.destroy()
    return found


def _checkpoint(learner: Learner, ranks: Ranks) -> int:
    """Bytes of its files."""
    folder = Path(ranks.from_main(tempfile.mkdtemp() if ranks.is_main else None))
    saver = Saver(folder, learner.owned, learner.training.checkpoint, ranks)
    saver.start(
        CheckpointState(
            step=3,
            samples_consumed={"main": 12},
            quarantined={},
            world_size=ranks.size,
            zero_stage=learner.training.zero_stage,
            precision=learner.precision,
            optimizer_steps=learner.optimizer_steps(),
            config=flat(learner.training.model_dump(mode="json")),
            export={},
        )
    )
    saver.finish()
    saver.close()
    if not ranks.is_main:
        return 0
    size = bytes_of(folder_of(folder, 3))
    shutil.rmtree(folder)
    return size


def made_real(model: torch.nn.Module) -> None:
    """On the CPU, with some finite values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
            else:
                buffer.zero_()


if __name__ == "__main__":
    main()
