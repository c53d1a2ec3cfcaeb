"""What a checkpoint is: its files, how it is known to be whole, and which ones are kept. Torch-free.

checkpoints/step_00001000/
    rank_00000.safetensors   the pieces of the state that rank 0 wrote, 1-D: ``MODULE/KIND/NAME@START``
    random_00000.pt          random states of rank 0
    index.json               key → shape, type and pieces (rank, start, stop) of every tensor
    state.json               step, samples consumed, world size, ZeRO stage, config, metrics
    COMPLETE                 bytes and sha256 of all these; written last, after every rank's files are on disk
checkpoints/latest           name of the newest complete one, replaced atomically after its marker

Pieces say where they belong in the flattened tensor, so a checkpoint can be read by any number of ranks at any ZeRO
stage, and by one process without DeepSpeed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from math import isnan, prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import UserError
from stpredict.run import write_atomically
from stpredict.training.config import CheckpointConfig
from stpredict.training.early_stopping import Waiting
from stpredict.training.guards import GuardState

FORMAT = 2
MARKER, LATEST = "COMPLETE", "latest"
INDEX, STATE = "index.json", "state.json"
READ_AT_ONCE = 2**24  # bytes


class CheckpointState(BaseModel):
    """state.json. ``samples_consumed`` of each shard set counts over all ranks; it is the position in the data.
    ``samples_replaced`` could not be read, and ``quarantined`` samples have stopped a data worker (key → why).

    ``optimizer_steps`` has the updates that each module's optimizer made and, by MODULE/NAME, of parameters that took
    part in fewer. ``config`` holds the settings, by dotted keys, that decide the weights. ``metrics`` are those of the
    validation at this step, if there was one. ``waiting`` is where early stopping stands. ``export`` is the config of
    an export of this checkpoint, so that exporting needs nothing but the checkpoint.
    """

    # NaN and Infinity as such: a PSNR may be one, and null would be refused when it is read.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    format: Literal[2] = FORMAT
    step: int
    samples_consumed: dict[str, int]
    samples_replaced: int = 0
    quarantined: dict[str, str]
    world_size: int
    zero_stage: int
    precision: str
    loss_scale: dict[str, float] | None = None  # of fp16
    optimizer_steps: dict[str, int]
    config: dict[str, Any]
    metrics: dict[str, float] = {}
    waiting: Waiting | None = None
    guards: GuardState = GuardState()
    export: dict[str, Any]


class TensorEntry(BaseModel):
    """Of a whole tensor: its shape, its type as safetensors names it, and (rank, start, stop) of each piece."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[int, int, int]]

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Written(BaseModel):
    """A file as it was written."""

    bytes: int
    sha256: str


class Marker(BaseModel):
    """COMPLETE. ``sha256`` is of ``files``: a name with a flipped bit would go unchecked."""

    files: dict[str, Written]
    sha256: str


Index = dict[str, TensorEntry]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def random_file(rank: int) -> str:
    return f"random_{rank:05d}.pt"


def piece_name(key: str, start: int) -> str:
    """The name of a piece in its rank's file."""
    return f"{key}@{start}"


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete or not, oldest first. What is named otherwise, a copy that somebody made, is none."""
    named = (folder for folder in checkpoints.glob("step_*") if folder.name.removeprefix("step_").isdecimal())
    return sorted(named, key=step_of)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Those with a marker, oldest first."""
    return [folder for folder in all_checkpoints(checkpoints) if (folder / MARKER).exists()]


def is_checkpoint(folder: Path) -> bool:
    """Whether it is one, complete or not; it may have been moved out of its run."""
    if not folder.is_dir():
        return False
    named = re.fullmatch(r"step_\d{8}", folder.name) and not (folder / "config.yaml").exists()  # an export has that
    return bool(named) or (folder / STATE).is_file() or (folder / MARKER).is_file()


def is_former(folder: Path) -> bool:
    """Whether it is a checkpoint of stpredict's first version: DeepSpeed's own files."""
    return next(folder.glob("*_model_states.pt"), None) is not None


def read_marker(folder: Path) -> dict[str, Written] | str:
    """The files of a checkpoint as they were written, or why it cannot be used."""
    if is_former(folder):
        return "is of an earlier version, DeepSpeed's own files, which cannot be read any more"
    damaged = f"has a marker, {MARKER}, that is damaged or of another version"
    try:
        marker = Marker.model_validate_json((folder / MARKER).read_bytes())
        return marker.files if marker.sha256 == digest_of(marker.files) else damaged
    except FileNotFoundError:
        return f"has no {MARKER} marker (its save was interrupted)"
    except OSError as error:
        return f"has a marker, {MARKER}, that cannot be read ({error.strerror})"
    except ValueError:
        return damaged


def digest_of(files: dict[str, Written]) -> str:
    text = json.dumps({name: file.model_dump() for name, file in files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def wrong_size(folder: Path, name: str, written: Written) -> str | None:
    """What is wrong with a file of a checkpoint that can be seen without reading it."""
    try:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return f"{name} has {size:,} bytes of {written.bytes:,}" if size != written.bytes else None


def damage(folder: Path, files: Iterable[tuple[str, Written]], working: Callable[[], None] = lambda: None) -> list[str]:
    """What is wrong with ``files`` of a checkpoint, after reading all their bytes. ``working`` is called meanwhile."""
    problems = []
    for name, written in files:
        if problem := wrong_size(folder, name, written):
            problems.append(problem)
            continue
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(READ_AT_ONCE):
                    digest.update(chunk)
                    working()
                if digest.hexdigest() != written.sha256:
                    problems.append(f"{name} differs from what was written")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def why_unusable(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str | None:
    """Why a checkpoint cannot be used, after reading all of it; None where it is sound. ``progress`` is told the bytes
    that have been read, and all."""
    files = read_marker(folder)
    if isinstance(files, str):
        return files
    done, total = 0, sum(file.bytes for file in files.values())
    problems = []
    for name, file in files.items():
        problems += damage(folder, [(name, file)])
        done += file.bytes
        progress(done, total)
    return f"is damaged ({'; '.join(problems)})" if problems else None


def read_state(folder: Path) -> CheckpointState:
    """UserError where state.json is absent, damaged or of another version."""
    return _read(CheckpointState, folder / STATE)


def read_index(folder: Path) -> Index:
    """UserError where index.json is absent or damaged."""
    try:
        entries = json.loads((folder / INDEX).read_text())
        return {key: TensorEntry.model_validate(entry) for key, entry in entries.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: cannot be read ({_first_line(error)}); use another checkpoint") from error


def _read(kind: type[BaseModel], path: Path):
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); use another checkpoint") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def build_index(held: Iterable[Iterable[tuple[str, tuple[int, ...], str, int, int]]]) -> Index:
    """The index of what each rank owns: (key, shape, dtype, start, stop) by rank. ValueError where the pieces of a
    tensor do not cover it exactly once."""
    index: Index = {}
    for rank, entries in enumerate(held):
        for key, shape, dtype, start, stop in entries:
            entry = index.setdefault(key, TensorEntry(shape=shape, dtype=dtype, pieces=[]))
            entry.pieces.append((rank, start, stop))
    for key, entry in index.items():
        entry.pieces.sort(key=lambda piece: piece[1])
        ends = [0, *(stop for _, _, stop in entry.pieces)]
        starts = [*(start for _, start, _ in entry.pieces), entry.elements]
        if ends != starts:
            raise ValueError(f"{key}: {entry.elements} elements, but the ranks hold {entry.pieces}")
    return index


def has_completed(checkpoints: Path) -> bool:
    """Whether any checkpoint has ever been completed there, as far as files still tell."""
    return (checkpoints / LATEST).exists() or bool(complete_checkpoints(checkpoints))


def write_complete(folder: Path, state: CheckpointState, index: Index, files: dict[str, Written]) -> None:
    """Finishes a checkpoint whose ranks have flushed ``files``: state and index, then the marker."""
    texts = {
        STATE: state.model_dump_json(indent=1) + "\n",
        INDEX: json.dumps({key: entry.model_dump(mode="json") for key, entry in index.items()}) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        files = {**files, name: Written(bytes=len(text.encode()), sha256=hashlib.sha256(text.encode()).hexdigest())}
        flush(folder / name)
    files = dict(sorted(files.items()))
    write_atomically(folder / MARKER, Marker(files=files, sha256=digest_of(files)).model_dump_json(indent=1) + "\n")
    flush(folder / MARKER)
    flush(folder)


def point_to(folder: Path) -> None:
    """``latest`` names ``folder``."""
    write_atomically(folder.parent / LATEST, folder.name + "\n")
    flush(folder.parent)


def flush(path: Path) -> None:
    """Has a file's bytes, or a folder's names, on disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def surplus(checkpoints: Path, newest: int, config: CheckpointConfig, given_up: Collection[Path] = ()) -> list[Path]:
    """Complete checkpoints that need not be kept once that of step ``newest`` is there: neither among the last
    ``keep``, nor every ``keep_every``-th step, nor the best by ``best`` (of equal ones, the latest).

    Those ``given_up`` (they were damaged when the run continued from an earlier one) take no other's place and stay
    until the run has come past their step again.
    """
    past = [folder for folder in complete_checkpoints(checkpoints) if step_of(folder) <= newest]
    known = [folder for folder in past if folder not in given_up]
    kept = set(known[-config.keep :])
    if config.keep_every:
        kept.update(folder for folder in known if step_of(folder) % config.keep_every == 0)
    if config.best:
        sign = 1 if config.best.mode == "max" else -1
        values = {folder: rating(folder, config.best.metric) for folder in known}
        rated = sorted((sign * value, folder) for folder, value in values.items() if value is not None)
        kept.update(folder for _, folder in rated[-config.best.keep :])
    return [folder for folder in past if folder not in kept]


def rating(folder: Path, name: str) -> float | None:
    """The metric ``name`` of a checkpoint. None where it was not validated, where that gave no number, or where it
    cannot be read and so not be used."""
    try:
        value = read_state(folder).metrics.get(name)
    except UserError:
        return None
    return None if value is None or isnan(value) else value


def best_checkpoint(checkpoints: Path, metric: str, mode: Literal["max", "min"]) -> Path | None:
    """The complete checkpoint that was best by a metric of the validation; of equal ones, the latest. None where none
    was saved with it."""
    values = {folder: rating(folder, metric) for folder in complete_checkpoints(checkpoints)}
    rated = {folder: value for folder, value in values.items() if value is not None}
    return (max if mode == "max" else min)(reversed(rated), key=rated.get) if rated else None


def bytes_of(folder: Path) -> int:
    """Bytes of all files in ``folder``; 0 where there is none. What somebody removes meanwhile does not count."""
    count = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                count += Path(path, name).stat().st_size
    return count
