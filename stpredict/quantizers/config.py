"""Configs of the quantizers that stand between a forecaster's encoder and its translator, or after that.

Those that choose codes are vector-quantize-pytorch's, with the settings of SVQ's table 11 as defaults.
"""

from math import log2, prod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config import Config

Level = Annotated[int, Field(ge=2)]


class QuantizerConfig(Config):
    """What every quantizer has."""

    #: Whether it adds to the loss what keeps latents close to codes.
    commits: ClassVar[bool] = False

    place: Literal["before", "after"] = Field("before", description="the translator")


class SvqConfig(QuantizerConfig):
    """Sparse vector quantization: an MLP's weights times a codebook, no arg-max. The defaults are the paper's."""

    kind: Literal["svq"] = "svq"
    codebook_size: int = Field(10_000, ge=1)
    hidden: int | None = Field(
        128,
        ge=1,
        description="width of the MLP; null: one linear layer without ReLU. The authors' code takes the size of the "
        "codebook where that is smaller",
    )
    learnable: bool = Field(True, description="the codebook; else it stays as it was drawn")
    init: Literal["normal", "kaiming_uniform", "xavier_uniform", "orthogonal"] = Field(
        "kaiming_uniform", description="of the codebook"
    )


class SvqRawConfig(QuantizerConfig):
    """Sparse coding by learned iterative shrinkage (LISTA), of which SVQ is the cheap approximation."""

    kind: Literal["svq_raw"] = "svq_raw"
    codebook_size: int = Field(1024, ge=1, description="cost and memory grow with its square")
    steps: int = Field(10, ge=1, description="of the shrinkage")


class AveragedCodesConfig(QuantizerConfig):
    """What those have whose codes are moving averages of the vectors that chose them."""

    commits: ClassVar[bool] = True

    codebook_size: int = Field(1024, ge=2)
    decay: float = Field(0.8, ge=0, lt=1, description="of the moving averages, per micro-batch")


class VqConfig(AveragedCodesConfig):
    """Vector quantization: the nearest code."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(512, ge=2)


class ResidualVqConfig(AveragedCodesConfig):
    """The nearest code, then that of what is left, and so on."""

    kind: Literal["residual_vq"] = "residual_vq"
    quantizers: int = Field(8, ge=1)
    shared: bool = Field(True, description="one codebook for all of them")
    stochastic: bool = Field(True, description="in training, codes are drawn: near ones are likelier")
    temperature: float = Field(0.1, gt=0, description="of that")


class GroupedResidualVqConfig(AveragedCodesConfig):
    """Channels in groups, each with a residual VQ of its own."""

    kind: Literal["grouped_residual_vq"] = "grouped_residual_vq"
    quantizers: int = Field(8, ge=1)
    groups: int = Field(2, ge=1)


class MultiHeadVqConfig(AveragedCodesConfig):
    """Several codes for a vector, one for each part of it, from one codebook."""

    kind: Literal["multi_head_vq"] = "multi_head_vq"
    heads: int = Field(8, ge=1)
    code_channels: int | None = Field(
        None, ge=1, description="channels of a code, with linear maps around; default: channels / heads, without"
    )


class ResidualFsqConfig(QuantizerConfig):
    """Finite scalar quantization, then that of what is left in smaller steps, and so on."""

    kind: Literal["residual_fsq"] = "residual_fsq"
    levels: tuple[Level, ...] = Field((8, 5, 5, 3), min_length=1, description="of each of the values")
    quantizers: int = Field(8, ge=1)
    codebook_size: int | None = Field(
        None, ge=2, description="must be the product of levels, where it is given; 8 5 5 5 comes near 1024"
    )

    @model_validator(mode="after")
    def _levels_make_the_codebook(self) -> Self:
        made = prod(self.levels)
        if self.codebook_size not in (None, made):
            levels = " x ".join(map(str, self.levels))
            raise ValueError(
                f"codebook_size {self.codebook_size}: the codes are the combinations of levels, {levels} = {made}; "
                "give levels (such as [8, 5, 5, 5], 1000 codes), and leave codebook_size out"
            )
        return self


class LfqConfig(QuantizerConfig):
    """Lookup-free quantization: the signs of log2(codebook_size) values."""

    commits: ClassVar[bool] = True

    kind: Literal["lfq"] = "lfq"
    codebook_size: int = Field(8192, ge=2, description="a power of 2")
    entropy: float = Field(0.1, ge=0, description="weight of: each location sure of its code, all codes alike in use")

    @model_validator(mode="after")
    def _codebook_is_a_power_of_two(self) -> Self:
        if not log2(self.codebook_size).is_integer():
            nearest = 2 ** round(log2(self.codebook_size))
            raise ValueError(f"codebook_size {self.codebook_size}: signs make a power of 2; the nearest is {nearest}")
        return self


class ResidualLfqConfig(LfqConfig):
    """Signs, then those of what is left at half the size, and so on."""

    kind: Literal["residual_lfq"] = "residual_lfq"
    codebook_size: int = Field(256, ge=2, description="a power of 2")
    quantizers: int = Field(8, ge=1)


AnyQuantizer = Annotated[
    SvqConfig
    | SvqRawConfig
    | VqConfig
    | ResidualVqConfig
    | GroupedResidualVqConfig
    | MultiHeadVqConfig
    | ResidualFsqConfig
    | LfqConfig
    | ResidualLfqConfig,
    Field(discriminator="kind"),
]
