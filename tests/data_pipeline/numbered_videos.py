"""Videos whose frames say which they are, and shard sets of them."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from data_pipeline.config import FolderSource
from data_pipeline.manifest import merge
from data_pipeline.shards import look, plan_shards, write_shards
from data_pipeline.sources.source import describe, walk
from data_pipeline.video_files import write_mp4


def numbered_frames(count: int, height: int = 32, width: int = 32, step: int = 6) -> np.ndarray:
    """uint8 (count, height, width, 3): frame n is plain grey of brightness 20 + n * step."""
    levels = (20 + step * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(clip: np.ndarray, step: int = 6) -> list[int]:
    """Which frames of ``numbered_frames`` a decoded clip shows."""
    return np.round((np.asarray(clip, float).mean(axis=(1, 2, 3)) - 20) / step).astype(int).tolist()


def make_videos(folder: Path, count: int, frames: int = 12, classes: int = 3) -> Path:
    for index in range(count):
        write_mp4(folder / f"class{index % classes}" / f"video{index:03d}.mp4", numbered_frames(frames), fps=10)
    return folder


def make_shards(videos: Path, out: Path, shards: int, window_bytes: int = 2**24) -> Path:
    """All videos of a folder as ``out``/train."""
    source = FolderSource(path=videos, validation_fraction=0)
    samples = walk(source)
    plans = plan_shards(source, samples, describe(source, samples), shards=shards, window_bytes=window_bytes, seed=0)
    write_shards(out / "train", plans)
    merge(out / "train")
    return out


def touchy_look(item):
    """Hangs on one video and dies of another, as decoders do: ``data_pipeline.shards.look`` for tests."""
    _, sample, _ = item
    if sample.path.stem == "video003":
        time.sleep(60)
    if sample.path.stem == "video005":
        os.kill(os.getpid(), signal.SIGSEGV)
    return look(item)


def write_and_die(folder, plans):
    """Is killed when all bytes of the first shard are written and nothing is renamed."""
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    write_shards(folder, plans)
