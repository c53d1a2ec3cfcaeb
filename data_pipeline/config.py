"""Configs of the data pipeline: where samples come from, how they are sharded and how clips are cut.

Torch-free, like every ``config.py`` of the project: a login node reads these in milliseconds.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of every config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FolderSource(Config):
    """Any folder of videos; the class of a video is the name of its sub-folder, where there is one.

    Folders named ``train`` and ``val`` directly under ``path`` are taken as the split; otherwise
    ``validation_fraction`` of the videos is held out, chosen by a hash of the key.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    validation_fraction: float = Field(0.1, ge=0, lt=1)


class MovingDigitsSource(Config):
    """Moving MNIST's rules (two digits bouncing in 64x64), rendered and encoded as H.264 .mp4 files."""

    kind: Literal["moving_digits"] = "moving_digits"
    videos: int = Field(2000, ge=1, description="training videos to render")
    validation_videos: int = Field(64, ge=1)
    frames: int = Field(17, ge=2)
    size: int = Field(64, ge=32, multiple_of=2, description="height and width in pixels")
    digits: int = Field(2, ge=1, description="digits in a video")
    digit_size: int = Field(28, ge=8, description="height and width of a digit in pixels")
    step_length: float = Field(0.1, gt=0, description="way per frame, as a share of the free range")
    fps: int = Field(10, ge=1)
    mnist: Path | None = Field(None, description="folder with MNIST's IDX files; without it, scikit-learn's digits")
    seed: int = 0


Source = Annotated[FolderSource | MovingDigitsSource, Field(discriminator="kind")]


class ClipConfig(Config):
    """How one clip is cut from a video: ``frames`` frames, ``stride`` apart, resized to ``size``."""

    frames: int = Field(17, ge=1)
    size: tuple[int, int] = Field((64, 64), description="height and width in pixels")
    stride: int = Field(1, ge=1, description="take every n-th frame")
    start: Literal["random", "centre", "first"] = "random"
    resize: Literal["crop", "stretch"] = Field(
        "crop", description="crop: short side to size, then centre crop; stretch: straight to size"
    )
    channels: Literal[1, 3] = Field(3, description="3: RGB; 1: luminance")


class ClipDataConfig(Config):
    """Clips from a shard set: ``shards`` is a shard job's run, which holds ``train/`` and ``val/``."""

    shards: Path
    clip: ClipConfig = ClipConfig()
    workers: int = Field(1, ge=0, description="DataLoader worker processes per rank")
    virtual_streams: int | None = Field(None, ge=1, description="V of the stream; default from the shard count")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="fail when more of the samples read are unreadable")


class LatentDataConfig(Config):
    """Cached latents: ``latents`` is an encode job's run, which holds ``train/`` and ``val/``."""

    latents: Path
    workers: int = Field(1, ge=0, description="DataLoader worker processes per rank")
    virtual_streams: int | None = Field(None, ge=1, description="V of the stream; default from the shard count")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="fail when more of the samples read are unreadable")
