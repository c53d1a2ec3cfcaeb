"""Checkpoints: DeepSpeed's own files plus what it leaves out, and a marker that says that all of it is there.

checkpoints/step_00001000/
    (DeepSpeed's files)   weights, optimizer, one part per rank
    rng_rank_N.pt         random states of rank N
    state.json            step, samples consumed, world size, ZeRO stage
    COMPLETE              sizes of all files; written last, after every rank's files are on disk
checkpoints/latest        name of the newest complete one, replaced atomically after its marker
"""

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from data_pipeline.errors import UsageError, UserError
from stpredict.run import write_atomically
from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)
MARKER = "COMPLETE"


class CheckpointState(BaseModel):
    """state.json. ``samples_consumed`` of each shard set counts over all ranks; it is the position in the data.
    ``quarantined`` samples have stopped a data worker (key → why).

    ``export`` is the config of an export of this checkpoint, so that exporting needs nothing but the checkpoint.
    """

    step: int
    samples_consumed: dict[str, int]
    quarantined: dict[str, str]
    world_size: int
    zero_stage: int
    precision: str
    config_hash: str
    export: dict[str, Any]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(marker.parent for marker in checkpoints.glob(f"step_*/{MARKER}"))


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; logs which newer ones are skipped, and why."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        problem = _problem(folder)
        if problem is None:
            return folder
        log.warning("%s %s: skipped", folder, problem)
    return None


def _problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be used: DeepSpeed would start with empty moments where one of its files is missing."""
    try:
        sizes = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return f"has no {MARKER} marker (its save was interrupted)"
    wrong = [name for name, size in sizes.items() if not _has_size(folder / name, size)]
    return f"is damaged ({', '.join(wrong)} missing or of another size)" if wrong else None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def read_state(checkpoint: Path) -> CheckpointState:
    return CheckpointState.model_validate_json((checkpoint / "state.json").read_text())


def save_checkpoint(engine, checkpoints: Path, state: CheckpointState, ranks: Ranks, keep: int) -> Path:
    """Saves on all ranks; returns the folder. Older checkpoints beyond ``keep`` are removed afterwards.

    UserError where the disk has no room; nothing that was complete before is touched then.
    """
    folder = checkpoints / f"step_{state.step:08d}"
    room = torch.zeros(2, dtype=torch.int64)  # needed, free: what rank 0 sees, so that all ranks decide alike
    if ranks.is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)  # left by an interrupted save
        room = torch.tensor([_bytes_needed(engine, checkpoints), shutil.disk_usage(checkpoints).free])
    needed, free = ranks.sum(room).tolist()
    if needed > free:
        raise UserError(
            f"{folder}: a checkpoint needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "make room and run again: it continues from the last checkpoint"
        )
    engine.save_checkpoint(str(checkpoints), tag=folder.name, save_latest=False)
    torch.save(_random_states(), folder / f"rng_rank_{ranks.rank}.pt")
    _flush(folder)
    ranks.barrier()
    if ranks.is_main:
        write_atomically(folder / "state.json", state.model_dump_json(indent=1) + "\n")
        _flush(folder)
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_atomically(folder / MARKER, json.dumps(sizes, indent=1) + "\n")
        write_atomically(checkpoints / "latest", folder.name + "\n")
        for old in complete_checkpoints(checkpoints)[:-keep]:
            (old / MARKER).unlink()
        for unfinished in checkpoints.glob("step_*"):  # these, and what a kill left behind
            if not (unfinished / MARKER).exists():
                shutil.rmtree(unfinished)
    ranks.barrier()
    return folder


def load_checkpoint(engine, checkpoint: Path, expected: CheckpointState, ranks: Ranks) -> CheckpointState:
    """Restores weights, optimizer and random states. ``expected`` is the state this run would save.

    UsageError where world size, ZeRO stage or precision differ from the checkpoint's.
    """
    state = read_state(checkpoint)
    keys = {"world_size": "resources.processes", "zero_stage": "training.zero_stage", "precision": "training.precision"}
    for name, key in keys.items():
        then, here = getattr(state, name), getattr(expected, name)
        if then != here:
            raise UsageError(f"{checkpoint}: saved with {name} {then}, this run has {here}; resume with {key}={then}")
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed found nothing to load in it; remove it to use the one before")
    _restore_random_states(torch.load(checkpoint / f"rng_rank_{ranks.rank}.pt", weights_only=True))
    return state


def _bytes_needed(engine, checkpoints: Path) -> int:
    """Bytes of the newest checkpoint, or an upper bound for the first: weights, fp32 master and two moments."""
    complete = complete_checkpoints(checkpoints)
    if complete:
        return sum(f.stat().st_size for f in complete[-1].rglob("*") if f.is_file())
    return 16 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _random_states() -> dict:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
    }


def _restore_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])


def gathered_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights and persistent buffers by name, from the files of any ZeRO stage, in one process."""
    if read_state(checkpoint).zero_stage == 0:
        saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in saved["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name))
