"""Writing checkpoints: a snapshot of what this rank owns, written while training goes on, and a marker at the end.

Every rank writes its own file in a thread that makes no collective calls. The ranks agree at a step boundary that all
files are on disk; then rank 0 writes state, index and marker. Whatever ends the job before that leaves the checkpoint
without its marker, and the one before as it was.
"""

import hashlib
import io
import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import UserError
from stpredict.training.checkpoint import (
    MARKER,
    CheckpointState,
    Index,
    Written,
    all_checkpoints,
    build_index,
    bytes_of,
    complete_checkpoints,
    flush,
    folder_of,
    piece_name,
    point_to,
    random_file,
    rank_file,
    step_of,
    surplus,
    write_complete,
)
from stpredict.training.config import CheckpointConfig
from stpredict.training.pieces import Piece
from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)
SAFETENSORS_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Files = dict[str, Written]


class Saver:
    """Saves checkpoints of what ``pieces()`` gives, the pieces that this rank owns, into ``checkpoints``; on all ranks
    alike.

    In the background (``config.background``) it keeps one copy of the pieces in host memory, made once and reused.
    """

    def __init__(
        self,
        checkpoints: Path,
        pieces: Callable[[], Sequence[Piece]],
        config: CheckpointConfig,
        ranks: Ranks,
        working: Callable[[], None] = lambda: None,
    ):
        self.working = working  # told, while this rank waits for its files, that they grow
        self.checkpoints, self.pieces, self.config, self.ranks = checkpoints, pieces, config, ranks
        now = pieces()
        self._entries = _entries(now)
        self.index: Index = build_index(ranks.gather(self._entries))
        self.bytes = sum(ranks.gather(sum(piece.tensor.nbytes for piece in now)))
        self.newest: Path | None = None  # the last one completed, or continued from
        self._given_up: set[Path] = set()
        self._copies: list[Tensor] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Files] | None = None
        self._state: CheckpointState | None = None
        self._since = 0.0

    @property
    def is_writing(self) -> bool:
        """A checkpoint has been started and not finished: on all ranks or on none."""
        return self._writing is not None

    @property
    def is_written(self) -> bool:
        """This rank's part of it is on disk, or has failed."""
        return self._writing is not None and self._writing.done()

    def continue_from(self, checkpoint: Path) -> None:
        """The state is that of ``checkpoint``; what later ones hold is history that is given up."""
        self.newest = checkpoint
        later = (folder for folder in complete_checkpoints(self.checkpoints) if step_of(folder) > step_of(checkpoint))
        self._given_up = set(later)
        if self.ranks.is_main:
            self._forget_surplus(step_of(checkpoint))  # fewer to keep than before may be what makes room for the next

    def start(self, state: CheckpointState) -> None:
        """Begins to save; what it saves may change as soon as this returns. UserError where there is no room."""
        assert self._writing is None, "finish() first"
        folder = folder_of(self.checkpoints, state.step)
        problem = None
        if self.ranks.is_main:
            try:
                self._make(folder)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{folder}: cannot be written: {error.strerror}"
        if problem := self.ranks.from_main(problem):
            raise UserError(problem)
        self._state, self._since = state, time.monotonic()
        pieces = self.pieces()
        if _entries(pieces) != self._entries:
            raise ValueError("a tensor of the model has changed its shape or type since the training began")
        tensors = self._snapshot(pieces) if self.config.background else [piece.tensor for piece in pieces]
        named = {piece_name(p.key, p.start): tensor for p, tensor in zip(pieces, tensors, strict=True)}
        self._writing = self._thread.submit(_write, folder, self.ranks.rank, named, random_states())
        if not self.config.background:
            self.finish()

    def finish(self, due: int | None = None) -> None:
        """Waits until all ranks have written, and completes the checkpoint. UserError where a rank could not. Says that
        training waits, where the next checkpoint, of step ``due``, is the reason."""
        if self._writing is None:
            return
        late, failure, files = not self._writing.done(), None, {}
        self._wait()
        try:
            files = self._writing.result()
        except Exception as error:  # of any kind: the other ranks are about to ask
            if not isinstance(error, OSError | SafetensorError):
                log.exception("writing a checkpoint")
            failure = f"{folder_of(self.checkpoints, self._state.step)}: cannot be written: {_reason(error)}"
        self._writing = None
        found: list[tuple[bool, str | None, Files]] = self.ranks.gather((late, failure, files))
        if due is not None and any(late for late, *_ in found):
            log.log(
                self.ranks.warning,
                "step %d: training waited for the checkpoint of step %d, which took %.1f s to write; "
                "raise training.checkpoint.every, or use a faster disk",
                due,
                self._state.step,
                time.monotonic() - self._since,
            )
        failure = next((failure for _, failure, _ in found if failure), None)
        if failure is None and self.ranks.is_main:
            failure = self._complete({name: file for *_, part in found for name, file in part.items()})
        if failure := self.ranks.from_main(failure):
            self._remove_unfinished()
            self._thread.submit(int).result()  # that is done: its room is free again before anything is logged
            kept = f"; {self.newest} is untouched" if self.newest else ""
            raise UserError(f"{failure}{kept}; make room and run again: it continues from the last checkpoint")
        self.newest = folder_of(self.checkpoints, self._state.step)
        log.info("saved %s (%.1f s)", self.newest, time.monotonic() - self._since)

    def _wait(self) -> None:
        """Until this rank's files are written, or cannot be."""
        folder, size = folder_of(self.checkpoints, self._state.step), -1
        while not wait([self._writing], timeout=2).done:
            file = folder / rank_file(self.ranks.rank)
            before, size = size, file.stat().st_size if file.exists() else 0
            if size != before:
                self.working()

    def close(self) -> None:
        self._thread.shutdown()

    def _make(self, folder: Path) -> None:
        """An empty ``folder``, if there is room for what will be in it."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)  # it was damaged, and its step has come again
        self._given_up.discard(folder)
        self._remove_unfinished()
        self._thread.submit(int).result()  # that is done
        free = shutil.disk_usage(self.checkpoints).free
        if self.bytes > free:
            raise UserError(
                f"{folder}: a checkpoint needs {_size(self.bytes)}, {_size(free)} are free; "
                "make room and run again: it continues from the last checkpoint"
            )
        if limit := self.config.max_bytes:
            there, export = bytes_of(self.checkpoints), self._export_bytes()
            if there + self.bytes + export > limit:
                raise UserError(
                    f"{folder}: a checkpoint of {_size(self.bytes)} beside the {_size(there)} that are there and the "
                    f"export of {_size(export)} exceeds training.checkpoint.max_bytes {_size(limit)}; keep fewer "
                    "(training.checkpoint.keep, keep_every, best), or raise the limit"
                )
        folder.mkdir()

    def _export_bytes(self) -> int:
        """What the run's export takes, but for integers in its buffers: weights and buffers in fp32."""
        kinds = ("model/weight", "model/buffer")
        return sum(4 * entry.elements for key, entry in self.index.items() if key.startswith(kinds))

    def _snapshot(self, pieces: Sequence[Piece]) -> list[Tensor]:
        if self._copies is None:
            self._copies = _host_copies(pieces)
        for copy, piece in zip(self._copies, pieces, strict=True):
            copy.copy_(piece.tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._copies

    def _complete(self, files: Files) -> str | None:
        """Marker, then retention; on rank 0. Returns what went wrong."""
        folder = folder_of(self.checkpoints, self._state.step)
        try:
            write_complete(folder, self._state, self.index, files)
        except OSError as error:
            return f"{folder}: cannot be written: {_reason(error)}"
        try:  # it is complete, whatever becomes of these
            point_to(folder)
            self._forget_surplus(self._state.step)
        except OSError as error:
            log.warning("%s is complete, but older ones stay for now: %s", folder, _reason(error))
        self._remove_unfinished()
        return None

    def _forget_surplus(self, newest: int) -> None:
        """Takes the markers of what need not be kept beside that of step ``newest``; on rank 0."""
        for old in surplus(self.checkpoints, newest, self.config, self._given_up):
            (old / MARKER).unlink(missing_ok=True)  # somebody may have removed it

    def _remove_unfinished(self) -> None:
        """What has no marker, in the thread, since large files take their time. On rank 0."""
        if not self.ranks.is_main:
            return
        complete = set(complete_checkpoints(self.checkpoints))
        for folder in set(all_checkpoints(self.checkpoints)) - complete:
            self._thread.submit(shutil.rmtree, folder, ignore_errors=True)


def _entries(pieces: Sequence[Piece]) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    """What the index has to know of each."""
    return [(p.key, p.shape, SAFETENSORS_TYPES[p.tensor.dtype], p.start, p.stop) for p in pieces]


def _host_copies(pieces: Sequence[Piece]) -> list[Tensor]:
    """Room for a copy of each piece, in one block of host memory. Where there is CUDA the block is registered with it,
    so that copies are fast: torch's own pinned memory would be rounded up to a power of two."""
    sizes = [-(-piece.tensor.nbytes // 8) * 8 for piece in pieces]  # where a tensor of any type may begin
    block = torch.empty(sum(sizes), dtype=torch.uint8)
    if torch.cuda.is_available() and sum(sizes):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    parts = zip(block.split(sizes), pieces, strict=True)
    return [part[: piece.tensor.nbytes].view(piece.tensor.dtype) for part, piece in parts]


def _write(folder: Path, rank: int, tensors: dict[str, Tensor], states: dict) -> Files:
    """Writes this rank's files and has them on disk; runs beside the training."""
    folder.mkdir(exist_ok=True)  # made by rank 0, which another node may not see yet
    pieces, states_file = folder / rank_file(rank), folder / random_file(rank)
    save_file(tensors, pieces)
    packed = io.BytesIO()
    torch.save(states, packed)  # to a file, it raises RuntimeError where the disk is full
    states_file.write_bytes(packed.getvalue())
    pieces.chmod(states_file.stat().st_mode)  # safetensors lets nobody else read what it writes
    files = {}
    for path in (pieces, states_file):
        flush(path)
        with path.open("rb") as file:
            files[path.name] = Written(
                bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
            )
    flush(folder)
    return files


def random_states() -> dict:
    """This process's random states, in types that torch.load takes from strangers."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def restore_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _size(count: int) -> str:
    """1.5 GiB, 3.0 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
        value /= 1024
    return f"{value:.1f} TiB"
