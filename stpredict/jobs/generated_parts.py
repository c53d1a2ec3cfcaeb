"""What the ranks of a generate job made, each its share, as one set of arrays."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.errors import UsageError
from stpredict.run import Run


def seed_of(seed: int, key: str) -> int:
    """A sample's own seed, so that its video does not depend on the batch or the rank that it fell into."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def write_part(run: Run, rank: int, arrays: Mapping[str, Sequence[np.ndarray]]) -> None:
    """samples/part_RANK.npz: of each name the batches' arrays, one after another; ``index`` and ``keys`` among them."""
    run.samples.mkdir(parents=True, exist_ok=True)
    merged = {name: np.concatenate(batches) for name, batches in arrays.items() if batches}
    np.savez(run.samples / f"part_{rank}.npz", **merged)


def merge_parts(run: Run, ranks: int, names: Sequence[str]) -> list[str]:
    """NAME.npy of all ``ranks``, in the order of ``index``; returns the keys."""
    paths = [run.samples / f"part_{rank}.npz" for rank in range(ranks)]
    parts = [part for part in map(np.load, paths) if "keys" in part]
    if not parts:
        raise UsageError(f"{run.path}: not one held-out clip could be read; look at the log for their names")
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    for name in names:
        np.save(run.samples / f"{name}.npy", np.concatenate([part[name] for part in parts])[order])
    keys = np.concatenate([part["keys"] for part in parts])[order].tolist()
    for path in paths:
        path.unlink()
    return keys
