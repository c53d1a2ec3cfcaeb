"""The losses that a tokenizer is trained with, and their weights."""

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.config import Config


class PatchGanConfig(Config):
    """A discriminator of patches of a video; the defaults are pix2pix's and TATS's, but for their BatchNorm."""

    kind: Literal["patch_gan"] = "patch_gan"
    channels: int = Field(
        64, ge=1, description="of the first convolution; each of the next has twice as many, up to 8x"
    )
    layers: int = Field(3, ge=1, description="convolutions of stride 2; two more follow")
    groups: int = Field(32, ge=1, description="of every GroupNorm")

    @model_validator(mode="after")
    def _groups_divide(self):
        if 2 * self.channels % self.groups:
            raise ValueError(f"2 x channels ({2 * self.channels}) must be a multiple of groups ({self.groups})")
        return self


class AdversarialLossConfig(Config):
    """What a discriminator and the model learn from each other; ``training.discriminator`` says when and how fast."""

    weight: float = Field(0.1, gt=0, description="of what the model learns from its judgement")
    loss: Literal["hinge", "non_saturating"] = "hinge"
    lecam: float = Field(0.0, ge=0, description="weight of the LeCam regularization; MAGVIT's is 0.001")
    lecam_decay: float = Field(0.99, gt=0, lt=1, description="of its average logits")
    r1: float = Field(0.0, ge=0, description="gamma of the R1 penalty on real clips")
    r1_every: int = Field(16, ge=1, description="updates of the discriminator from one R1 penalty to the next")
    discriminator: PatchGanConfig = PatchGanConfig()


class TokenizerLossConfig(Config):
    """Weighted sum of mean absolute and mean squared error between the clip and its reconstruction, and of what a
    discriminator makes of that."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    # Left out where there is none: runs that are older than the key are runs without.
    adversarial: AdversarialLossConfig | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _something(self):
        if not self.l1 and not self.l2:
            raise ValueError("one of l1 and l2 must be above 0")
        return self
