"""Reading weights and checkpoints into whatever a rank holds, piece by piece."""

import logging
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data_pipeline.errors import UsageError, UserError
from stpredict.training.checkpoint import (
    CheckpointState,
    TensorEntry,
    all_checkpoints,
    damage,
    has_completed,
    is_former,
    piece_name,
    random_file,
    rank_file,
    read_index,
    read_marker,
    read_state,
)
from stpredict.training.pieces import Held, Piece
from stpredict.training.ranks import Ranks
from stpredict.training.saving import SAFETENSORS_TYPES, restore_random_states

log = logging.getLogger(__name__)
MAPPED_BYTES = 64 * 2**20
_TYPES = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}


class CheckpointWeights:
    """The weights and buffers of a checkpoint's model, by name, floats in fp32; the averages in place of the weights
    that have one, if ``ema`` (default: where there are averages). UsageError where they are asked for and there are
    none."""

    def __init__(self, folder: Path, ema: bool | None = None):
        self.folder, self._reader = folder, CheckpointReader(folder)
        index = self._reader.index
        averages = {key.split("/", 2)[2] for key in index if key.startswith("model/ema/")}
        if ema and not averages:
            raise UsageError(f"{folder}: was trained without training.ema_decay: it has no averages of its weights")
        self.ema = bool(averages) if ema is None else ema
        self._keys = {}
        for key in sorted(index):
            module, kind, name = key.split("/", 2)
            if module == "model" and kind in ("weight", "buffer"):
                averaged = self.ema and kind == "weight" and name in averages
                self._keys[name] = f"model/ema/{name}" if averaged else key
        self.shapes = {name: index[key].shape for name, key in self._keys.items()}
        self.types = {name: _as_exported(index[key].dtype) for name, key in self._keys.items()}
        self.sizes = {name: prod(shape) * self.types[name].itemsize for name, shape in self.shapes.items()}  # bytes

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Sets ``out``, 1-D, to elements ``start`` and following of the flattened tensor ``name``."""
        self._reader.fill(self._keys[name], start, out)


def _as_exported(dtype: str) -> torch.dtype:
    dtype = _TYPES[dtype]
    return torch.float32 if dtype.is_floating_point else dtype


class CheckpointReader:
    """The tensors of a complete checkpoint, by key; only what is asked for is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = read_index(folder)
        self._files: dict[int, safe_open] = {}
        self._mapped = 0

    def fill(self, key: str, start: int, out: Tensor) -> None:
        """Sets ``out``, 1-D, to elements ``start`` and following of the flattened tensor ``key``."""
        stop = start + out.numel()
        for rank, first, last in self.index[key].pieces:
            low, high = max(start, first), min(stop, last)
            if low < high:
                part = self._file(rank).get_slice(piece_name(key, first))[low - first : high - first]
                out[low - start : high - start].copy_(part)
                self._mapped += part.nbytes
        if self._mapped > MAPPED_BYTES:
            # What has been read of a mapped file counts as this process's memory for as long as the file is open.
            self._files.clear()
            self._mapped = 0

    def tensor(self, key: str) -> Tensor:
        """The whole tensor ``key``, in the type it was saved in."""
        entry = self.index[key]
        rank, first, _ = entry.pieces[0]
        dtype = self._file(rank).get_slice(piece_name(key, first))[:0].dtype
        whole = torch.empty(entry.elements, dtype=dtype)
        self.fill(key, 0, whole)
        return whole.view(entry.shape)

    def _file(self, rank: int) -> safe_open:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / rank_file(rank), framework="pt")
        return self._files[rank]


def newest_sound_checkpoint(checkpoints: Path, ranks: Ranks, working: Callable[[], None] = lambda: None) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; logs which newer ones are skipped, and why. None
    where none was ever completed; UserError where some were and none can be used, so that training does not begin anew
    by itself. ``working`` is called while they are read.

    UsageError where the run has been trained by an earlier version: to begin anew would replace its checkpoints.
    """
    folders, begun = ranks.from_main((all_checkpoints(checkpoints)[::-1], has_completed(checkpoints)))
    skipped = []
    for folder in folders:
        problem = why_unusable_together(folder, ranks, working)
        if problem is None:
            return folder
        if ranks.from_main(is_former(folder)):
            raise UsageError(f"{folder} {problem}; use another `run` (init_from takes the export of this one)")
        skipped.append(f"{folder.name} {problem}")
        if ranks.is_main:
            log.warning("%s %s: skipped", folder, problem)
    if begun:
        raise UserError(
            f"{checkpoints}: none of its checkpoints can be used ({'; '.join(skipped) or 'they are gone'}); "
            "to train from the start, remove this folder"
        )
    return None


def why_unusable_together(folder: Path, ranks: Ranks, working: Callable[[], None] = lambda: None) -> str | None:
    """Why a checkpoint cannot be used; None where it is sound. The ranks read a share of the files each."""
    files = ranks.from_main(read_marker(folder) if ranks.is_main else None)
    if isinstance(files, str):
        return files
    found = ranks.gather(damage(folder, list(files.items())[ranks.rank :: ranks.size], working))
    problems = "; ".join(problem for part in found for problem in part)
    return f"is damaged ({problems})" if problems else None


def restore(
    folder: Path,
    held: Sequence[Held],
    averages: Iterable[Piece],
    ranks: Ranks,
    working: Callable[[], None] = lambda: None,
) -> CheckpointState:
    """Sets modules, moments, step counts, ``averages`` and, at the world size of the checkpoint, random states; calls
    ``working`` after each of their pieces.

    UsageError where the checkpoint is of another model. On all ranks.
    """
    state, reader = read_state(folder), CheckpointReader(folder)
    pieces = [piece for part in held for piece in part.pieces()]
    refuse_other_model(folder, pieces, reader.index, ranks)
    for piece in pieces:
        reader.fill(piece.key, piece.start, piece.tensor)
        working()
    for piece in averages:
        # An average that begins now begins at the weights.
        key = piece.key if piece.key in reader.index else piece.key.replace("/ema/", "/weight/", 1)
        reader.fill(key, piece.start, piece.tensor)
        working()
    for part in held:
        steps = state.optimizer_steps
        part.set_steps({name: steps.get(f"{part.module}/{name}", steps[part.module]) for name in part.steps()})
        part.refresh()
    if state.world_size == ranks.size:
        states = folder / random_file(ranks.rank)
        restore_random_states(torch.load(states, weights_only=True))
    return state


def refuse_other_model(folder: Path, pieces: Iterable[Piece], index: dict[str, TensorEntry], ranks: Ranks) -> None:
    """UsageError, on all ranks, unless ``index`` has exactly the weights, buffers and moments that the ranks hold."""
    here: dict[str, tuple[int, ...]] = {}
    for part in ranks.gather({piece.key: piece.shape for piece in pieces}):
        here.update(part)
    there = {key: entry.shape for key, entry in index.items() if key.split("/")[1] != "ema"}
    lines = _unlike(_without_moments(here), _without_moments(there)) or _unlike(here, there)
    if lines:
        raise UsageError(f"{folder}: a checkpoint of another model: {'; '.join(lines)}; use another `run`")


def _without_moments(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The parameters and buffers themselves: each would be named three times."""
    return {key: shape for key, shape in shapes.items() if key.split("/")[1] in ("weight", "buffer")}


def _unlike(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        *named("it lacks", here.keys() - there.keys()),
        *named("it has besides", there.keys() - here.keys()),
        *named(
            "shapes differ:",
            [f"{key} {there[key]} → {here[key]}" for key in here.keys() & there.keys() if here[key] != there[key]],
        ),
    ]


def named(what: str, keys: Iterable[str]) -> list[str]:
    keys = sorted(keys)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [f"{what} {', '.join(keys[:3])}{more}"] if keys else []
