"""Random generators named by what they are for. Torch-free.

Two generators agree when their names agree, on every machine and in every process, and are unrelated otherwise;
so nothing random here depends on how many processes there are or on the order in which they work.
"""

import hashlib

import numpy as np


def generator(*name: str | int) -> np.random.Generator:
    """A generator seeded by ``name``, for example ``generator("window", seed, epoch, shard, window)``."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def share(*name: str | int) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
