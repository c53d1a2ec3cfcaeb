"""Configs of the data pipeline: where samples come from, how they are sharded and how clips are cut.

Torch-free, like every ``config.py`` of the project: a login node reads these in milliseconds.
"""

import re
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    create_model,
    model_validator,
)


class Config(BaseModel):
    """Base of every config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# A folder, a URL, or several of them in braces: text, because a Path would turn s3:// into s3:/.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)  # a set has the first two, and the third where its source does


class FolderSource(Config):
    """Any folder of videos or images; the class of a video is the name of its sub-folder, where there is one.

    Folders named ``train`` and ``val``, and ``test`` if there is one, directly under ``path`` are taken as the split;
    otherwise ``validation_fraction`` of the videos is held out, chosen by a hash of the key.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    validation_fraction: float = Field(0.1, ge=0, lt=1)


class Ucf101Source(Config):
    """UCF-101: ``path`` holds the class folders; the published lists say what is for training and what for testing."""

    kind: Literal["ucf101"] = "ucf101"
    path: Path
    fold: Literal[1, 2, 3] = 1
    lists: Path | None = Field(None, description="folder of the lists; default: ucfTrainTestlist in or beside path")


class KineticsSource(Config):
    """Kinetics-400, 600 or 700: the published csv files, and whatever part of the videos could be downloaded."""

    kind: Literal["kinetics"] = "kinetics"
    path: Path = Field(description="folder of the videos, in sub-folders or not")
    annotations: Path | None = Field(None, description="csv file or folder of them; default: path and path/annotations")


class KthSource(Config):
    """KTH actions: persons 1 to 16 for training, 17 to 25 for validation, as in the papers on video prediction."""

    kind: Literal["kth"] = "kth"
    path: Path


class CutsConfig(Config):
    """How a long recording is cut along time into samples: ``sequence`` consecutive steps, or those at ``offsets``.

    A sample starts ``every`` steps; fewer than it spans, and neighbours overlap. Samples of two splits never do.
    """

    sequence: int | None = Field(None, ge=1, description="cut along time into sequences of so many steps")
    offsets: tuple[int, ...] = Field(
        (),
        exclude_if=lambda value: not value,
        description="instead of sequence, for frames that are not evenly apart: their steps, such as "
        "[-17, -11, -5, 0, 1, 7, 13, 19]",
    )
    every: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="steps from one sample's start to the next; default: as many as it spans",
    )

    @property
    def frame_steps(self) -> tuple[int, ...]:
        """The steps of a sample's frames, from its first one; none where nothing is cut."""
        return tuple(offset - self.offsets[0] for offset in self.offsets) or tuple(range(self.sequence or 0))

    @property
    def span(self) -> int:
        """Steps from a sample's first to its last frame, both included."""
        return self.frame_steps[-1] + 1

    @property
    def pace(self) -> int:
        """Steps from one sample's start to the next."""
        return self.every or self.span

    @model_validator(mode="after")
    def _cuts_make_sense(self) -> Self:
        if self.sequence and self.offsets:
            raise ValueError("sequence and offsets both say which steps make a sample: leave one of them out")
        if any(later <= earlier for earlier, later in zip(self.offsets, self.offsets[1:], strict=False)):
            raise ValueError(f"offsets {list(self.offsets)} must ascend")
        if self.every and not self.frame_steps:
            raise ValueError("every says where sequences start: give sequence or offsets too")
        return self


class ArraysSource(CutsConfig):
    """Arrays in .npy or .npz files, stored as (t, h, w, c): uint8 as they are, all other numbers as float32.

    With an axis ``n``, each of its entries is a sample; without one, each file is, or ``sequence`` steps of it.
    ``train``, ``val`` and ``test`` are ranges, end excluded, of samples, or of steps where time is cut; files count on
    from one to the next in the order of their names. Without any, ``validation_fraction`` is held out: the samples
    with the lowest hash of the key, or, of sequences, the last in time.
    """

    kind: Literal["arrays"] = "arrays"
    path: Path = Field(description="a file, a folder of files, or a pattern such as /data/*.npz")
    member: str | None = Field(None, description="name of the array in an .npz; default: its only one")
    axes: str = Field("t h w c", description="axes of the array in its order, of n t h w c; n and c may be absent")
    dtype: Literal["uint8", "float32"] | None = Field(None, description="default: uint8 stays, all else is float32")
    channels: tuple[str, ...] = Field((), description="names of the channels")
    units: tuple[str, ...] = Field((), description="units of the channels")
    train: tuple[int, int] | None = None
    val: tuple[int, int] | None = None
    test: tuple[int, int] | None = Field(None, exclude_if=lambda value: value is None)
    validation_fraction: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _axes_make_sense(self) -> Self:
        axes = self.axes.split()
        if len(set(axes)) < len(axes) or not {"t", "h", "w"} <= set(axes) <= {"n", "t", "h", "w", "c"}:
            raise ValueError(f"axes is '{self.axes}': give t, h and w, and n and c where there are such, each once")
        if self.frame_steps and "n" in axes:
            what = "sequence cuts" if self.sequence else "offsets cut"
            raise ValueError(f"{what} arrays without an axis n; leave one of them out")
        if self.units and len(self.units) != len(self.channels):
            raise ValueError(f"{len(self.units)} units for {len(self.channels)} channels: give one each")
        for split in self.ranges.values():
            if not 0 <= split[0] < split[1]:
                raise ValueError(f"{list(split)} is no range: give its first index and the one after its last")
        for (name, one), (other_name, other) in combinations(self.ranges.items(), 2):
            if one[0] < other[1] and other[0] < one[1]:
                raise ValueError(f"{name} {list(one)} and {other_name} {list(other)} overlap")
        return self

    @property
    def ranges(self) -> dict[Split, tuple[int, int]]:
        """Those that are given."""
        return {split: given for split in SPLITS if (given := getattr(self, split))}


def _date(text: str) -> str:
    if not re.fullmatch(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d)?)?)?)?", text):
        raise ValueError(f"{text!r} is no date; write 2010, 2010-01, 2010-01-31 or 2010-01-31T18")
    return text


# YAML takes 2010 for a number.
_Date = Annotated[str, BeforeValidator(lambda value: str(value)), AfterValidator(_date)]


class AxisNames(Config):
    """What a netCDF file calls the axes of its fields, where that is none of the usual names."""

    time: str | None = None
    level: str | None = None
    latitude: str | None = None
    longitude: str | None = None


class NetcdfSource(CutsConfig):
    """Fields in netCDF files (3 or 4), by the names of their variables, stored as (t, h, w, c) in float32.

    The variables are the channels, in their order; of fields on several levels, each of ``levels`` is one: u_500. A
    variable's files follow each other in time; different variables may stand in different files. ``train``, ``val``
    and ``test`` are times, first and last, both included: ["2010", "2015"] ends with 2015. Without any, the last
    ``test_fraction`` of the samples and the ``validation_fraction`` before them are held out.
    """

    kind: Literal["netcdf"] = "netcdf"
    path: Path = Field(description="a file, a folder with what is below it, or a pattern such as /data/{u,v}_wind/*.nc")
    variables: tuple[str, ...] = Field(min_length=1, description="names in the files, such as [t2m]")
    levels: tuple[float, ...] = Field((), description="of variables that have levels, in the files' unit (hPa)")
    axes: AxisNames = AxisNames()
    units: dict[str, str] = Field({}, description="of a variable, instead of what the files say")
    fill: float | None = Field(
        None, allow_inf_nan=False, description="put where values are missing; without it, those are refused"
    )
    train: tuple[_Date, _Date] | None = None
    val: tuple[_Date, _Date] | None = None
    test: tuple[_Date, _Date] | None = None
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    test_fraction: float = Field(0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fields_make_sense(self) -> Self:
        if not self.frame_steps:
            raise ValueError("give sequence, the steps of a sample, or offsets")
        for names in (self.variables, self.levels):
            if len(set(names)) < len(names):
                raise ValueError(f"{list(names)} names one twice")
        if strange := self.units.keys() - set(self.variables):
            raise ValueError(f"units of {min(strange)}, which variables does not name")
        return self

    @property
    def ranges(self) -> dict[Split, tuple[str, str]]:
        """Those that are given."""
        return {split: given for split in SPLITS if (given := getattr(self, split))}


class TaxiBjSource(Config):
    """TaxiBJ: flows of taxis in Beijing, sequences of 8 half hours; ``dataset.npz`` or the original .h5 files.

    The last ``validation_fraction`` of the sequences for training is held out; the test is that of dataset.npz, or the
    last ``test_days`` of the .h5 files.
    """

    kind: Literal["taxibj"] = "taxibj"
    path: Path = Field(description="a file, or the folder of dataset.npz or BJ13_M32x32_T30_InOut.h5, BJ14, …")
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    test_days: int = Field(28, ge=0, description="of the .h5 files; four weeks since the paper")


class MovingDigitsSource(Config):
    """Moving MNIST's rules (two digits bouncing in 64x64), rendered and encoded as H.264 .mp4 files, or stored as
    rendered."""

    kind: Literal["moving_digits"] = "moving_digits"
    format: Literal["mp4", "npy"] = Field(
        "mp4",
        exclude_if=lambda value: value == "mp4",
        description="mp4: encoded with losses, RGB; npy: uint8 arrays (t, h, w, 1), exactly as rendered",
    )
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


Source = Annotated[
    FolderSource
    | Ucf101Source
    | KineticsSource
    | KthSource
    | ArraysSource
    | NetcdfSource
    | TaxiBjSource
    | MovingDigitsSource,
    Field(discriminator="kind"),
]


MAX_PIXELS = 2**25  # height x width: 7680 x 4320 fits


class ClipConfig(Config):
    """How clips are cut from a video: ``frames`` frames, ``stride`` apart, resized and cropped to ``size``.

    Everything random is drawn once per clip, from (seed, epoch, key): all its frames are treated alike.
    """

    frames: int = Field(17, ge=1)
    size: tuple[PositiveInt, PositiveInt] = Field((64, 64), description="height and width in pixels")
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


#: Some keys of a clip: those left out, or null, are as in the clip that is changed.
ClipChanges = create_model(
    "ClipChanges",
    __base__=Config,
    **{name: (field.annotation | None, None) for name, field in ClipConfig.model_fields.items()},
)


class CacheConfig(Config):
    """Where shards that are read over the network are kept on local disk; all processes of a machine share it."""

    folder: Path = Field(description="on a disk of the machine; only the cache's own files in it are ever removed")
    bytes: int = Field(
        100 * 2**30,
        ge=1,
        description="the least recently read shards go first; less than the shards that the machine's virtual streams "
        "read at a time (one each) means fetching them again for every window",
    )


class StreamConfig(Config):
    """What every stream of a shard set has."""

    workers: int = Field(1, ge=0, description="DataLoader worker processes per rank and set")
    virtual_streams: int | None = Field(None, ge=1, description="V of the stream; default from the shard count")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="fail when more of the samples read are unreadable")
    timeout_s: float = Field(60, gt=0, description="a worker that is longer at one sample is replaced, the sample too")
    buffer_bytes: int = Field(4 * 2**30, ge=1, description="most that one worker may hold in shuffle windows")
    cache: CacheConfig | None = Field(None, description="of shards that are read over the network")


MAIN = "main"  # in positions and messages: the set that is not in the mix


def _without_main(mix: dict) -> dict:
    if MAIN in mix:
        raise ValueError(f"{MAIN!r} is the set outside the mix; give this one another name")
    return mix


OutsideMain = AfterValidator(_without_main)


class ClipSetConfig(Config):
    """One more shard set to draw training clips from."""

    shards: Location
    clip: ClipConfig = ClipConfig()
    weight: float = Field(1, gt=0)
    virtual_streams: int | None = Field(None, ge=1, description="V of this set's stream; default from its shard count")


class ClipDataConfig(StreamConfig):
    """Clips from a shard set: ``shards`` is a shard job's run, which holds ``train/`` and ``val/``, on disk or at a
    URL (s3://, gs://, https://); braces name several: ``runs/part-{0..3}``.

    Training steps draw from this set and those of ``mix`` by their weights, each step from one; validation from this.
    """

    shards: Location
    clip: ClipConfig = ClipConfig()
    weight: float = Field(1, gt=0, description="of this set in the mix")
    mix: Annotated[dict[str, ClipSetConfig], OutsideMain] = Field(
        {}, description="more sets to train on, by name; keys of their clips that are left out are as in clip"
    )

    @model_validator(mode="before")
    @classmethod
    def _clips_of_the_mix_begin_as_this_one(cls, data: Any) -> Any:
        match data:
            case {"clip": dict(clip), "mix": dict(mix)}:
                with_clips = {
                    name: {**member, "clip": {**clip, **member.get("clip", {})}} if isinstance(member, dict) else member
                    for name, member in mix.items()
                }
                return {**data, "mix": with_clips}
        return data


class LatentSetConfig(Config):
    """One more latent set to draw from."""

    latents: Location
    weight: float = Field(1, gt=0)
    virtual_streams: int | None = Field(None, ge=1, description="V of this set's stream; default from its shard count")


class LatentDataConfig(StreamConfig):
    """Cached latents: ``latents`` is an encode job's run, which holds ``train/`` and ``val/``."""

    latents: Location
    weight: float = Field(1, gt=0, description="of this set in the mix")
    mix: Annotated[dict[str, LatentSetConfig], OutsideMain] = {}
