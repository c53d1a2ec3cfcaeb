"""Moving MNIST's rules, rendered and encoded as real video files, or stored as they are rendered.

Digits start at a random place, move in a random direction at constant speed and bounce off the walls; where they
overlap the brighter pixel wins (Srivastava et al. 2015, arXiv:1502.04681, section 4.1 and the published generator).
Validation videos show digits that no training video shows. Every video depends on (seed, split, index) alone.
"""

import gzip
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.arrays import npy_bytes
from data_pipeline.config import MovingDigitsSource
from data_pipeline.errors import UsageError
from data_pipeline.seeding import generator
from data_pipeline.sources.source import SourceSample, Split

_MNIST_FILES = {"train": "train", "val": "t10k"}


def walk(config: MovingDigitsSource) -> list[SourceSample]:
    """The videos to render: which digits each shows is known beforehand."""
    if config.digit_size > config.size:
        raise UsageError(f"source.digit_size {config.digit_size} is larger than the video, source.size {config.size}")
    pixels = config.frames * config.size**2
    about = pixels if config.format == "npy" else pixels // 5  # measured: about a twentieth of a byte a pixel
    samples = []
    counts: dict[Split, int] = {"train": config.videos, "val": config.validation_videos}
    for split, count in counts.items():
        _, labels = digit_images(config, split)
        for index in range(count):
            shown, _ = trajectories(config, split, index, len(labels))
            name, metadata = f"{split}/{index:06d}.{config.format}", {"digits": labels[shown].tolist()}
            samples.append(SourceSample(f"digits-{split}-{index:06d}", split, None, name, metadata, None, index, about))
    return samples


def read(config: MovingDigitsSource, sample: SourceSample) -> tuple[str, bytes]:
    """Renders a video: an .mp4 of it, or an .npy uint8 (t, h, w, 1)."""
    digits, _ = digit_images(config, sample.split)
    shown, positions = trajectories(config, sample.split, sample.item, len(digits))
    frames = render(digits[shown], positions, config.size)
    if config.format == "npy":
        return "npy", npy_bytes(frames[..., None])
    from data_pipeline.video_files import write_mp4

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        write_mp4(path, np.repeat(frames[..., None], 3, axis=-1), config.fps)
        return "mp4", path.read_bytes()


def trajectories(config: MovingDigitsSource, split: Split, index: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``images`` images video ``index`` shows, int (digits,), and where: the top left corner of each
    digit in pixels, int (frames, digits, 2)."""
    rng = generator("moving_digits", config.seed, split, index)
    shown = rng.integers(images, size=config.digits)
    place = rng.random((config.digits, 2))
    angle = rng.random(config.digits) * 2 * np.pi
    velocity = np.stack([np.sin(angle), np.cos(angle)], axis=-1) * config.step_length
    places = np.empty((config.frames, config.digits, 2))
    for frame in range(config.frames):
        place = place + velocity
        velocity = np.where((place <= 0) | (place >= 1), -velocity, velocity)
        place = np.clip(place, 0, 1)
        places[frame] = place
    return shown, (places * (config.size - config.digit_size)).astype(int)


def render(images: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """Digits uint8 (digits, s, s) at ``positions`` int (frames, digits, 2) → uint8 (frames, size, size)."""
    frames = np.zeros((len(positions), size, size), np.uint8)
    side = images.shape[-1]
    for frame, corners in zip(frames, positions, strict=True):
        for image, (top, left) in zip(images, corners, strict=True):
            area = frame[top : top + side, left : left + side]
            np.maximum(area, image, out=area)
    return frames


@lru_cache(maxsize=2)
def digit_images(config: MovingDigitsSource, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images of digits, uint8 (n, digit_size, digit_size), and which digit each is, int (n,)."""
    if config.mnist is not None:
        images = _read_idx(config.mnist, f"{_MNIST_FILES[split]}-images-idx3-ubyte")
        names = _read_idx(config.mnist, f"{_MNIST_FILES[split]}-labels-idx1-ubyte")
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, names = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
        part = slice(None, -360) if split == "train" else slice(-360, None)  # a fifth for validation
        images, names = images[part], names[part]
    if images.shape[1:] != (config.digit_size, config.digit_size):
        side = (config.digit_size, config.digit_size)
        images = np.stack([np.asarray(Image.fromarray(i).resize(side, Image.Resampling.BICUBIC)) for i in images])
    return images, names


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or .gz: magic 0 0 8 ndim, big-endian sizes, data."""
    if (path := folder / name).exists():
        data = path.read_bytes()
    elif (path := folder / f"{name}.gz").exists():
        data = gzip.decompress(path.read_bytes())
    else:
        raise UsageError(f"{folder}: no {name} or {name}.gz; source.mnist must name the folder of MNIST's IDX files")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
