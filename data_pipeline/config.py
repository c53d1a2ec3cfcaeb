"""Configs of the data pipeline: where samples come from, how they are sharded and how clips are cut.

Torch-free, like every ``config.py`` of the project: a login node reads these in milliseconds.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# A folder, a URL, or several of them in braces: text, because a Path would turn s3:// into s3:/.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


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


MAX_PIXELS = 2**25  # height x width: 7680 x 4320 fits


class ClipConfig(Config):
    """How clips are cut from a video: ``frames`` frames, ``stride`` apart, resized and cropped to ``size``.

    Everything random is drawn once per clip, from (seed, epoch, key): all its frames are treated alike.
    """

    frames: int = Field(17, ge=1)
    size: tuple[int, int] = Field((64, 64), description="height and width in pixels")
    fps: float | None = Field(None, gt=0, description="frames per second, picked by timestamp; default: every frame")
    stride: int = Field(1, ge=1, description="take every n-th frame (of those at fps, where that is given)")
    start: Literal["random", "centre", "first"] = "random"
    per_video: int = Field(1, ge=1, description="clips per video and epoch, from as many equal parts of it")
    resize: Literal["crop", "stretch"] = Field(
        "crop", description="crop: short side to short_side, then cut out size; stretch: straight to size"
    )
    short_side: int | None = Field(None, ge=1, description="pixels, before the crop; default: as small as size allows")
    crop: Literal["centre", "random"] = "centre"
    flip: bool = Field(False, description="mirror every other clip left to right")
    channels: Literal[1, 3] = Field(3, description="3: RGB; 1: luminance")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="refuse videos with larger frames: height x width")

    @model_validator(mode="after")
    def _crop_is_possible(self) -> Self:
        if self.resize == "stretch" and (self.short_side is not None or self.crop == "random"):
            raise ValueError("resize: stretch keeps all of a frame: short_side and crop: random go with resize: crop")
        if self.short_side is not None and self.short_side < max(self.size):
            raise ValueError(f"short_side {self.short_side} is less than size {self.size}: set it to {max(self.size)}")
        return self

    @property
    def unaugmented(self) -> "ClipConfig":
        """The same clips without random crop and flip: for validation."""
        return self.model_copy(update={"crop": "centre", "flip": False})


class CacheConfig(Config):
    """Where shards from an object store are kept on local disk; processes of one machine share it."""

    folder: Path
    bytes: int = Field(100 * 2**30, ge=1, description="the least recently read shards go first")


class StreamConfig(Config):
    """What every stream of a shard set has."""

    workers: int = Field(1, ge=0, description="DataLoader worker processes per rank and set")
    virtual_streams: int | None = Field(None, ge=1, description="V of the stream; default from the shard count")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="fail when more of the samples read are unreadable")
    timeout_s: float = Field(60, gt=0, description="a worker that is longer at one sample is replaced, the sample too")
    buffer_bytes: int = Field(4 * 2**30, ge=1, description="most that one worker may hold in shuffle windows")
    cache: CacheConfig | None = Field(None, description="of shards that are read over the network")


class ClipSetConfig(Config):
    """One more shard set to draw training clips from."""

    shards: Location
    clip: ClipConfig = ClipConfig()
    weight: float = Field(1, gt=0)


class ClipDataConfig(StreamConfig):
    """Clips from a shard set: ``shards`` is a shard job's run, which holds ``train/`` and ``val/``, on disk or at a
    URL (s3://, gs://, https://); braces name several: ``runs/part-{0..3}``.

    Training steps draw from this set and those of ``mix`` by their weights, each step from one; validation from this.
    """

    shards: Location
    clip: ClipConfig = ClipConfig()
    weight: float = Field(1, gt=0, description="of this set in the mix")
    mix: dict[str, ClipSetConfig] = {}


class LatentSetConfig(Config):
    """One more latent set to draw from."""

    latents: Location
    weight: float = Field(1, gt=0)


class LatentDataConfig(StreamConfig):
    """Cached latents: ``latents`` is an encode job's run, which holds ``train/`` and ``val/``."""

    latents: Location
    weight: float = Field(1, gt=0, description="of this set in the mix")
    mix: dict[str, LatentSetConfig] = {}
