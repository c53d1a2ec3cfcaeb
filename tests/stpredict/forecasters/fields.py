"""Small shard sets that forecasters are trained on: a field that moves, and video."""

from pathlib import Path

import numpy as np

from stpredict.jobs import shard
from stpredict.jobs.config import ShardConfig
from stpredict.run import Run

CHANNELS, UNITS = ("warm", "damp"), ("K", "g/kg")
OFFSET, SCALE = np.array([280.0, 5.0]), np.array([10.0, 0.5])
SIZE = (12, 16)
STEPS = 60


def moving_field(steps: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """float32 ``(steps, height, width, 2)`` in physical units: waves that go by, and a little noise."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(steps), np.arange(height), np.arange(width), indexing="ij")
    waves = np.stack([np.sin(0.5 * x - 0.4 * t) + np.cos(0.3 * y), np.cos(0.4 * x + 0.3 * y - 0.3 * t)], axis=-1)
    return ((waves + 0.05 * rng.normal(size=waves.shape)) * SCALE + OFFSET).astype(np.float32)


def make_field_shards(folder: Path, size: tuple[int, int] = SIZE, steps: int = STEPS) -> Path:
    """Windows of 6 steps: training on the first four fifths, validation on the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "field.npy", moving_field(steps, *size))
    return _shards(
        folder,
        {
            "kind": "arrays",
            "path": folder / "field.npy",
            "axes": "t h w c",
            "sequence": 6,
            "channels": CHANNELS,
            "units": UNITS,
            "train": (0, steps * 4 // 5),
            "val": (steps * 4 // 5, steps),
        },
    )


def make_video_shards(folder: Path, clips: int = 10, frames: int = 6, side: int = 16) -> Path:
    """uint8 frames of one channel: a bright square that moves."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    videos = np.zeros((clips, frames, side, side, 1), np.uint8)
    for video in videos:
        top, left = rng.integers(0, side - 6, 2)
        for number, frame in enumerate(video):
            frame[top : top + 4, (left + number) % side : (left + number) % side + 4] = 255
    np.save(folder / "video.npy", videos)
    source = {"kind": "arrays", "path": folder / "video.npy", "axes": "n t h w c", "validation_fraction": 0.3}
    return _shards(folder, source)


def _shards(folder: Path, source: dict) -> Path:
    run = Run(folder / "shards")
    run.update_status(kind="shard")
    shard.run(ShardConfig(run=run.path, source=source, min_samples_per_shard=1), run)
    return run.path
