"""Configs of the priors."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from data_pipeline.config import ClipChanges, ClipConfig, Config, LatentDataConfig, Location, OutsideMain
from data_pipeline.errors import UsageError
from stpredict.attention.config import Backend
from stpredict.tokenizers.config import TOKENIZED_TOGETHER, CausalCnnConfig, TokenizedClipDataConfig


class CachedLatentsConfig(LatentDataConfig):
    """Latents that an encode job made."""

    kind: Literal["latents"] = "latents"


class TokenizedClipSetConfig(Config):
    """One more shard set to draw training clips from."""

    shards: Location
    clip: ClipChanges = Field(ClipChanges(), description="where it differs from data.clip")
    weight: float = Field(1, gt=0)
    virtual_streams: int | None = Field(None, ge=1, description="V of this set's stream; default from its shard count")


class TokenizedClipsConfig(TokenizedClipDataConfig):
    """Clips, tokenized when they are needed: nothing is stored, and every epoch may cut others."""

    kind: Literal["clips"] = "clips"
    weight: float = Field(1, gt=0, description="of this set in the mix")
    mix: Annotated[dict[str, TokenizedClipSetConfig], OutsideMain] = Field(
        {}, description="other sets to draw training clips from"
    )
    batch_size: int = Field(TOKENIZED_TOGETHER, ge=1, description="clips per forward of the tokenizer")


def _kind(data: Any) -> Any:
    """Which of the two: cached latents, unless ``kind`` says otherwise."""
    return data.get("kind", "latents") if isinstance(data, dict) else getattr(data, "kind", None)


PriorDataConfig = Annotated[
    Annotated[CachedLatentsConfig, Tag("latents")] | Annotated[TokenizedClipsConfig, Tag("clips")], Discriminator(_kind)
]


class GivenFrames(Config):
    """The first frames of a video are always given: its first block is not predicted."""

    kind: Literal["frames"] = "frames"


class _Started(Config):
    """The first block is predicted too. ``start`` says from what: ``block`` from a learned block before it; ``hybrid``
    token by token, each from those before it, as in the published code (and then block by block, from that block)."""

    start: Literal["block", "hybrid"] = "block"


class Unconditional(_Started):
    """Videos from nothing."""

    kind: Literal["none"] = "none"


class _Labelled(_Started):
    """A prefix says what the video shows. For classifier-free guidance, training leaves out ``dropout`` of them."""

    dropout: float = Field(0.1, ge=0, lt=1, description="share of training samples whose prefix is the null prefix")


class ClassLabels(_Labelled):
    """One token that stands for the video's class."""

    kind: Literal["class"] = "class"


class TextTokens(_Labelled):
    """The name of the video's class as text, in ``tokens`` tokens: longer texts are cut, padding is not seen."""

    kind: Literal["text"] = "text"
    tokenizer: Path = Field(description="a tokenizer.json of the tokenizers library; the prior needs it ever after")
    vocabulary: int = Field(32_000, ge=1, description="ids that the tokenizer has at most")
    tokens: int = Field(8, ge=1)


Conditioning = Annotated[GivenFrames | Unconditional | ClassLabels | TextTokens, Field(discriminator="kind")]


class NextBlockConfig(Config):
    """LLaMA-style transformer that predicts the next block of tokens (NBP). The defaults are NBP-XL (700 M).

    ``block`` is (T, H, W) in tokens; (1, 1, 1) is next-token prediction. ``rope_axes`` 3 rotates by
    (t, h, w); 1 by the position in the sequence, as LLaMA does.
    """

    kind: Literal["next_block"] = "next_block"
    layers: int = Field(24, ge=1)
    width: int = Field(1536, ge=1)
    heads: int = Field(16, ge=1)
    mlp_width: int = Field(4096, ge=1)
    block: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 16)
    rope_axes: Literal[1, 3] = 3
    dropout: float = Field(0.1, ge=0, lt=1)
    attention: Backend = Field("auto", description="what computes attention; `stpredict doctor` says what there is")
    # Left out where it is the default: runs that are older than the key are such runs.
    conditioning: Conditioning = Field(
        GivenFrames(),
        exclude_if=lambda value: value == GivenFrames(),
        description="what is known of a video before its first predicted block",
    )

    @property
    def prefix(self) -> int:
        """Inputs before the video's."""
        match self.conditioning:
            case ClassLabels():
                return 1
            case TextTokens(tokens=tokens):
                return tokens
        return 0

    @property
    def predicts_first_block(self) -> bool:
        return not isinstance(self.conditioning, GivenFrames)

    @property
    def labelled(self) -> bool:
        return isinstance(self.conditioning, _Labelled)

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.width // self.heads < 2 * self.rope_axes:
            raise ValueError(
                f"heads of {self.width // self.heads} channels have no two for each of {self.rope_axes} axes of "
                "rotary positions: take fewer heads, or rope_axes 1"
            )
        return self


class LatentConfig(Config):
    """Token ids below ``codebook_size`` on a ``grid`` (T', H', W')."""

    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    codebook_size: int = Field(ge=2)
    classes: int | None = Field(
        None, ge=1, exclude_if=lambda value: value is None, description="of the videos, for a prior of class labels"
    )


def given_latent_frames(given: int, clip: ClipConfig, tokenizer: CausalCnnConfig, prior: NextBlockConfig) -> int:
    """Latent frames that ``given`` frames of a clip make. UsageError where they do not, or are not whole blocks, or
    leave nothing to predict."""
    if given == 0:
        if not prior.predicts_first_block:
            raise UsageError(
                "given_frames 0: this prior continues frames (model.conditioning.kind frames); give some, or train one "
                "of another kind"
            )
        return 0
    try:
        latent = tokenizer.grid(given, *clip.size)[0]
    except ValueError as error:
        raise UsageError(f"given_frames: {error}") from error
    if given >= clip.frames or latent % prior.block[0]:
        raise UsageError(
            f"given_frames {given}: the {latent} latent frames they make must be whole blocks (model.block) and leave "
            f"some of the clip's {clip.frames} frames to predict"
        )
    return latent
