"""Latents → a set of latent shards: KEY.npy (n, …) and KEY.json.gz, the keys and labels of the n clips. Torch-free.

Token ids (n, T', H', W') stand in the smallest unsigned type that holds the codebook; floats (n, C, T', H', W') as
bfloat16, which numpy does not have: as its bits, in uint16. Names of clips are compressed because they would take up
to 5 % of a small latent. A member is a window of the stream, so ``clips_per_member`` clips are shuffled together.

The clips of a set stand in one order, and shard i of n holds the i-th of n equal runs of it. So what a shard holds
depends on neither how many processes write the set nor which of them does; each writes its shards one after another,
and when it is started again goes on behind the last one that it finished.

    writer = LatentWriter(folder, clips=1000, shards=latent_shards(1000, 96), writer=rank, writers=ranks, …)
    with writer:
        for positions in writer.missing: … writer.append(positions, latents, keys, labels)
    … when every writer is done, in one of them: data_pipeline.manifest.merge(folder)
"""

import gzip
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.config import ClipConfig
from data_pipeline.manifest import FORMAT, Description, clear, plan_hash, read_record, shard_name
from data_pipeline.order import divisible_count
from data_pipeline.tar_shard import TarShard

FEWEST_CLIPS = 4  # per shard
AROUND_MEMBER = 2300  # bytes: tar headers, filling up to their blocks, the .npy header
MOST_AROUND = 0.01  # of a member; names and labels come on top
SHUFFLED = 64  # clips to a member, for the shuffling's sake …
SHUFFLED_BYTES = 4 * 2**20  # … where they take no more than this


def latent_shards(clips: int, wanted: int) -> int:
    """Shards for ``clips`` clips: ``wanted`` or fewer, so that a shard holds at least a few clips."""
    return divisible_count(min(wanted, clips // FEWEST_CLIPS))


def default_clips_per_member(latent_bytes: int) -> int:
    """Clips of ``latent_bytes`` bytes each to a member: enough that tar and .npy headers are 1 % at most, and to
    shuffle well."""
    return max(math.ceil(AROUND_MEMBER / (MOST_AROUND * latent_bytes)), min(SHUFFLED, SHUFFLED_BYTES // latent_bytes))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Floats → the bits of their bfloat16, uint16: rounded to the nearest, halves to even; nan stays nan."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | ((bits & 0x7FFFFF != 0) & ((bits >> 16) & 0x7F == 0))  # nan with low bits only
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


class LatentWriter:
    """Writes the shards ``writer``, ``writer + writers``, … of a latent set of ``clips`` clips.

    Ids below ``codebook_size``, or floats of ``channels`` channels: one of the two is given. ``plan`` says what is
    encoded and how (any text that changes when the latents would): shards finished for the same plan are kept.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        clips: int,
        shards: int,
        grid: tuple[int, int, int],
        fingerprint: str,
        codebook_size: int | None = None,
        channels: int | None = None,
        clips_per_member: int | None = None,
        writer: int = 0,
        writers: int = 1,
        plan: str = "",
        classes: Sequence[str] = (),
        clip: ClipConfig | None = None,
    ):
        if (codebook_size is None) == (channels is None):
            raise ValueError("give codebook_size, for token ids, or channels, for floats")
        self._folder, self._clips, self._shards = Path(folder), clips, shards
        dtype = np.min_scalar_type(codebook_size - 1) if codebook_size else np.dtype(np.uint16)
        self._dtype, self._shape = dtype, grid if codebook_size else (channels, *grid)
        self._clips_per_member = clips_per_member or default_clips_per_member(math.prod(self._shape) * dtype.itemsize)
        description = Description(
            kind="latents",
            classes=list(classes),
            fingerprint=fingerprint,
            grid=grid,
            dtype=dtype.name if codebook_size else "bfloat16",
            codebook_size=codebook_size,
            latent_channels=channels,
            clip=clip,
        )
        about = description.model_dump(mode="json")
        self._plan = plan_hash(FORMAT, plan, about, self._clips_per_member, clips, shards)
        self._description = description.model_copy(update={"plan": self._plan})
        self._todo = [index for index in range(writer, shards, writers) if not self._is_finished(index)]
        self._tar: TarShard | None = None  # of the first shard to do
        self._waiting: list[tuple[np.ndarray, str, int]] = []
        self._members = 0

    @property
    def missing(self) -> list[range]:
        """The positions of the clips that are still to be appended, shard by shard."""
        return [self._positions(index) for index in self._todo]

    @property
    def missing_bytes(self) -> int:
        """What these clips take on the disk, but for what stands around them."""
        return sum(map(len, self.missing)) * math.prod(self._shape) * self._dtype.itemsize

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._todo:
            clear(self._folder, self._todo, self._shards)
        return self

    def append(self, positions: Sequence[int], latents: np.ndarray, keys: Sequence[str], labels: Sequence[int]) -> None:
        """Adds n clips, in the order of ``missing``; those that could not be read are left out.

        ``latents``: integers (n, T', H', W') or floats (n, C, T', H', W'), with a key and a label (-1: none) each.
        ValueError if the shape is another, an id is not below the codebook's size or a position is not missing.
        """
        stored = self._stored(np.asarray(latents))
        for position, row, key, label in zip(positions, stored, keys, labels, strict=True):
            while self._todo and position >= self._positions(self._todo[0]).stop:
                self._finish_shard()
            if not self._todo or position not in self._positions(self._todo[0]):
                raise ValueError(f"position {position} is written already, or another writer's")
            self._waiting.append((row, str(key), int(label)))
            if len(self._waiting) == self._clips_per_member:
                self._write_member()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._todo:
                self._finish_shard()
        finally:
            if self._tar:
                self._tar.discard()

    def _is_finished(self, index: int) -> bool:
        record = read_record(self._folder, index)
        return record is not None and record.plan == self._plan

    def _positions(self, index: int) -> range:
        return range(index * self._clips // self._shards, (index + 1) * self._clips // self._shards)

    def _stored(self, latents: np.ndarray) -> np.ndarray:
        """Checked, and of the type that is stored."""
        size = self._description.codebook_size
        what, kinds = ("integers", "iu") if size else ("floats", "f")
        if latents.shape[1:] != self._shape or latents.dtype.kind not in kinds:
            raise ValueError(f"expected {what} (n, {self._shape}), got {latents.dtype} {latents.shape}")
        if size is None:
            return to_bfloat16(latents)
        if latents.size and not 0 <= latents.min() <= latents.max() < size:
            raise ValueError(f"ids {latents.min()}..{latents.max()}, codebook size {size}")
        return latents.astype(self._dtype)

    def _open(self) -> TarShard:
        if self._tar is None:
            self._tar = TarShard(self._folder, self._todo[0], window_bytes=0)
        return self._tar

    def _write_member(self) -> None:
        rows, keys, labels = zip(*self._waiting, strict=True)
        buffer = io.BytesIO()
        np.save(buffer, np.stack(rows), allow_pickle=False)
        contents = {"keys": keys, "labels": labels, "values": self._description.dtype}
        about = json.dumps(contents, separators=(",", ":"), ensure_ascii=False)
        name = f"{self._folder.name}-{shard_name(self._todo[0])}-{self._members:06d}"
        members = {"npy": buffer.getvalue(), "json.gz": gzip.compress(about.encode(), mtime=0)}
        self._open().add(name, members, count=len(rows))
        self._waiting = []
        self._members += 1

    def _finish_shard(self) -> None:
        if self._waiting:
            self._write_member()
        self._open().finish(self._description, self._shards, self._plan)
        self._todo.pop(0)
        self._tar, self._members = None, 0
