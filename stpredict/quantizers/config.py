"""Configs of the quantizers that stand between a forecaster's encoder and its translator, or after that."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.config import Config


class QuantizerConfig(Config):
    """What every quantizer has."""

    #: Whether it adds to the loss what keeps latents close to codes.
    commits: ClassVar[bool] = False

    place: Literal["before", "after"] = Field("before", description="the translator")


class SvqConfig(QuantizerConfig):
    """Sparse vector quantization: an MLP's weights times a codebook, no arg-max. The defaults are the paper's."""

    kind: Literal["svq"] = "svq"
    codebook_size: int = Field(10_000, ge=1)
    hidden: int | None = Field(128, ge=1, description="width of the MLP; null: one linear layer without ReLU")
    learnable: bool = Field(True, description="the codebook; else it stays as it was drawn")
    init: Literal["normal", "kaiming_uniform", "xavier_uniform", "orthogonal"] = Field(
        "kaiming_uniform", description="of the codebook"
    )


class SvqRawConfig(QuantizerConfig):
    """Sparse coding by learned iterative shrinkage (LISTA), of which SVQ is the cheap approximation."""

    kind: Literal["svq_raw"] = "svq_raw"
    codebook_size: int = Field(1024, ge=1)
    steps: int = Field(10, ge=1, description="of the shrinkage")


AnyQuantizer = Annotated[SvqConfig | SvqRawConfig, Field(discriminator="kind")]
