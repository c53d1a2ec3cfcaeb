"""Configs of the tokenizers."""

from math import prod
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipeline.config import ClipChanges, ClipConfig, Config, Location, StreamConfig
from data_pipeline.errors import UsageError

TOKENIZED_TOGETHER = 4  # clips to a forward pass of a trained tokenizer, unless a config says otherwise


class CausalCnnConfig(Config):
    """Causal 3D CNN with FSQ (NBP). The defaults are the published tokenizer: 370,372,105 parameters.

    Frames are compressed by ``spatial_factor`` in space and ``temporal_factor`` in time; the first frame
    stands alone, so 1 + temporal_factor * n frames become 1 + n latent frames.
    """

    kind: Literal["causal_cnn"] = "causal_cnn"
    video_channels: int = 3
    patch: int = Field(1, ge=1, description="pixels folded into channels by the stem, per side; 1 as published")
    channels: tuple[PositiveInt, ...] = (128, 256, 256, 512)
    blocks: tuple[NonNegativeInt, ...] = Field((4, 4, 4, 4), description="residual blocks of each encoder stage")
    decoder_blocks: tuple[NonNegativeInt, ...] | None = Field(
        None, description="of the decoder; default: as the encoder"
    )
    strides: tuple[tuple[int, int, int], ...] = Field(
        ((1, 2, 2), (2, 2, 2), (2, 2, 2)), description="(t, h, w) of the convolution after each stage but the last"
    )
    middle_blocks: int = Field(4, ge=0)
    groups: int = Field(32, ge=1, description="groups of every GroupNorm, per frame")
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (8, 8, 8, 5, 5, 5), min_length=1, description="of FSQ; their product is the codebook size"
    )

    @model_validator(mode="after")
    def _stages_agree(self):
        stages = len(self.channels)
        decoder = self.decoder_blocks or self.blocks
        if not len(self.blocks) == len(decoder) == stages or len(self.strides) != stages - 1:
            raise ValueError(
                f"{stages} channels need {stages} entries in blocks and decoder_blocks and {stages - 1} strides"
            )
        if any(c % self.groups for c in self.channels):
            raise ValueError(f"every entry of channels must be a multiple of groups ({self.groups})")
        if any(t not in (1, 2) or h != w or h not in (1, 2) for t, h, w in self.strides):
            raise ValueError("strides must be 1 or 2, the same for height and width")
        return self

    @property
    def codebook_size(self) -> int:
        return prod(self.levels)

    @property
    def temporal_factor(self) -> int:
        return prod(stride[0] for stride in self.strides)

    @property
    def spatial_factor(self) -> int:
        return self.patch * prod(stride[1] for stride in self.strides)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The token grid (T', H', W') of a clip; ValueError where the clip does not fit the factors."""
        t, s = self.temporal_factor, self.spatial_factor
        if (frames - 1) % t or height % s or width % s:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} does not fit this tokenizer: "
                f"it takes 1 + {t}n frames and sides that are multiples of {s}"
            )
        return 1 + (frames - 1) // t, height // s, width // s

    def check_clip(self, clip: ClipConfig, where: str) -> tuple[int, int, int]:
        """The token grid of ``clip``. UsageError where its channels, frames or size do not fit."""
        if clip.channels != self.video_channels:
            raise UsageError(f"{where}: clips have {clip.channels} channels, the tokenizer takes {self.video_channels}")
        try:
            return self.grid(clip.frames, *clip.size)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error


class TilingConfig(Config):
    """How much of a video goes through a trained tokenizer at once, where all of it does not fit.

    In time the result is that of all at once. In space it is only nearly so, since every norm is one over a frame.
    """

    latent_frames: int | None = Field(None, ge=1, description="that go through at once; default: all")
    tile: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width, in pixels, of what goes through at once; default: all"
    )
    overlap: int | None = Field(
        None, ge=0, description="pixels that neighbouring tiles share at least; default: a quarter of the tile"
    )

    @model_validator(mode="after")
    def _tiles_overlap(self):
        if self.tile is None and self.overlap is not None:
            raise ValueError("overlap is that of tiles: give `tile` too")
        if self.tile and self.overlap is not None and self.overlap >= min(self.tile):
            raise ValueError(f"overlap {self.overlap}: tiles of {self.tile[0]}x{self.tile[1]} would not get on")
        return self

    def check(self, model: CausalCnnConfig, where: str) -> None:
        """UsageError where tiles are no whole number of the tokenizer's latents."""
        factor = model.spatial_factor
        wrong = [side for side in (*(self.tile or ()), self.overlap or 0) if side % factor]
        if wrong:
            raise UsageError(
                f"{where}: {wrong[0]} pixels: sides of tiles and their overlap have to be multiples of {factor}"
            )


WHOLE = TilingConfig()


class TokenizedClipDataConfig(StreamConfig):
    """Clips for a trained tokenizer: ``shards`` is a shard job's run, or several in braces."""

    shards: Location
    clip: ClipChanges = Field(ClipChanges(), description="where it differs from what the tokenizer was trained on")
