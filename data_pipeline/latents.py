"""Token ids → a set of latent shards: KEY.npy (n, T', H', W') in the smallest type that holds the codebook, and
KEY.json with the keys and labels of the n clips. A member is a window of the stream: ``clips_per_member`` is also
how many clips are shuffled with each other. Torch-free.

    writer = LatentWriter(folder, shards=latent_shards(clips, 96, world_size), rank=rank, world_size=world_size, …)
    if not writer.finished:
        with writer:
            for …: writer.append(tokens, keys, labels)
    … when every rank is here, on rank 0: data_pipeline.manifest.merge(folder)
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.config import ClipConfig
from data_pipeline.manifest import FORMAT, Description, clear, plan_hash, read_record, shard_name
from data_pipeline.order import divisible_count
from data_pipeline.tar_shard import TarShard

FEWEST_CLIPS = 4  # per shard


def latent_shards(clips: int, wanted: int, world_size: int) -> int:
    """Shards for ``clips`` clips written by ``world_size`` ranks: ``wanted`` or fewer, but one for every rank."""
    return max(divisible_count(min(wanted, clips // FEWEST_CLIPS)), world_size)


class LatentWriter:
    """One rank's part of a latent set: the shards rank, rank + world_size, …, to which it deals its clips in turn.

    ``plan`` says what is encoded and how (any text that changes when the latents would): where all of the rank's
    shards are there for the same plan, ``finished`` is true and there is nothing to do. Shards get their names when
    the ``with`` block ends well.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        grid: tuple[int, int, int],
        codebook_size: int,
        fingerprint: str,
        clips_per_member: int,
        shards: int,
        rank: int = 0,
        world_size: int = 1,
        plan: str = "",
        classes: Sequence[str] = (),
        clip: ClipConfig | None = None,
    ):
        if shards < world_size:
            raise ValueError(f"{shards} shards for {world_size} ranks: every rank needs one")
        self._folder = Path(folder)
        self._dtype = np.min_scalar_type(codebook_size - 1)
        self._clips_per_member, self._shards = clips_per_member, shards
        self._description = Description(
            kind="latents",
            classes=list(classes),
            fingerprint=fingerprint,
            grid=grid,
            codebook_size=codebook_size,
            clip=clip,
        )
        about = self._description.model_dump(mode="json")
        self._plan = plan_hash(FORMAT, plan, about, clips_per_member, shards, world_size)
        self._mine = list(range(rank, shards, world_size))
        self._tars: list[TarShard] = []
        self._waiting: list[list[tuple[np.ndarray, str, int]]] = [[] for _ in self._mine]
        self._members = [0 for _ in self._mine]
        self._appended = 0

    @property
    def finished(self) -> bool:
        """Whether all shards of this rank are written, for the same plan."""
        records = [read_record(self._folder, index) for index in self._mine]
        return all(record is not None and record.plan == self._plan for record in records)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        clear(self._folder, self._mine, self._shards)
        self._tars = [TarShard(self._folder, index, window_bytes=0) for index in self._mine]
        return self

    def append(self, tokens: np.ndarray, keys: Sequence[str], labels: Sequence[int]) -> None:
        """Adds n clips: ``tokens`` integers (n, T', H', W'), with a key and a label (-1: none) each.

        ValueError if the grid is another or an id is not below the codebook's size.
        """
        tokens = np.asarray(tokens)
        if tokens.shape[1:] != self._description.grid or tokens.dtype.kind not in "iu":
            raise ValueError(f"expected integers (n, {self._description.grid}), got {tokens.dtype} {tokens.shape}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._description.codebook_size:
            raise ValueError(f"ids {tokens.min()}..{tokens.max()}, codebook size {self._description.codebook_size}")
        for row, key, label in zip(tokens.astype(self._dtype), keys, labels, strict=True):
            turn = self._appended % len(self._mine)
            self._waiting[turn].append((row, str(key), int(label)))
            self._appended += 1
            if len(self._waiting[turn]) == self._clips_per_member:
                self._write_member(turn)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for turn, tar in enumerate(self._tars):
                    self._write_member(turn)
                    tar.finish(self._description, self._shards, self._plan)
        finally:
            for tar in self._tars:
                tar.discard()

    def _write_member(self, turn: int) -> None:
        if not self._waiting[turn]:
            return
        rows, keys, labels = zip(*self._waiting[turn], strict=True)
        buffer = io.BytesIO()
        np.save(buffer, np.stack(rows), allow_pickle=False)
        name = f"{self._folder.name}-{shard_name(self._mine[turn])}-{self._members[turn]:06d}"
        self._tars[turn].add(name, {"npy": buffer.getvalue()}, {"keys": keys, "labels": labels}, count=len(rows))
        self._waiting[turn] = []
        self._members[turn] += 1
