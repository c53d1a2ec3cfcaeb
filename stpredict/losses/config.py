"""The losses that a tokenizer is trained with, and their weights."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipeline.config import ClipConfig, Config
from data_pipeline.errors import UsageError

LPIPS_SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels per side: four times halved; strides of 4, 2 and 2


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


class LpipsConfig(Config):
    """LPIPS with VGG16 or AlexNet, whose weights are in neither this repository nor its dependencies."""

    kind: Literal["lpips"] = "lpips"
    # Left out where it is VGG16: runs that are older than the key are runs with it.
    network: Literal["vgg16", "alexnet"] = Field(
        "vgg16",
        exclude_if=lambda value: value == "vgg16",
        description="losses take VGG16; papers on frame prediction print the LPIPS of AlexNet",
    )
    trunk: Path | None = Field(
        None, description="the network's weights in torchvision's layout, .pth or .safetensors; default: downloaded"
    )
    heads: Path | None = Field(
        None, description="weights of the features' channels in the lpips package's layout; default: torchmetrics' copy"
    )

    def check_clip(self, clip: ClipConfig, where: str) -> None:
        """UsageError where the network cannot look at its frames."""
        smallest = LPIPS_SMALLEST[self.network]
        if min(clip.size) < smallest:
            raise UsageError(
                f"{where}: LPIPS needs frames of {smallest}x{smallest} at least, clips have {clip.size[0]}x"
                f"{clip.size[1]}; take loss.perceptual.network={{kind: random_features}}, or loss.perceptual=null"
            )


class RandomFeaturesConfig(Config):
    """A network of fixed random convolutions, for machines without VGG16's weights. It is no LPIPS."""

    kind: Literal["random_features"] = "random_features"
    seed: int = 0
    channels: tuple[PositiveInt, ...] = Field((32, 64, 128), min_length=1, description="of each scale")

    def check_clip(self, clip: ClipConfig, where: str) -> None:
        """UsageError where its frames have not that many scales."""
        smallest = 2 ** (len(self.channels) - 1)
        if min(clip.size) < smallest:
            raise UsageError(f"{where}: {len(self.channels)} scales need frames of {smallest}x{smallest} at least")


class PerceptualLossConfig(Config):
    """Distance of frames as a network sees them; also a metric of the validation."""

    weight: float = Field(0.1, ge=0, description="0: a metric of the validation only")
    network: Annotated[LpipsConfig | RandomFeaturesConfig, Field(discriminator="kind")] = LpipsConfig()


class TokenizerLossConfig(Config):
    """Weighted sum of mean absolute and mean squared error between the clip and its reconstruction, of how different
    they look to a network, and of what a discriminator makes of the reconstruction."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    # Left out where there is none: runs that are older than the keys are runs without.
    perceptual: PerceptualLossConfig | None = Field(None, exclude_if=lambda value: value is None)
    adversarial: AdversarialLossConfig | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _something(self):
        if not self.l1 and not self.l2:
            raise ValueError("one of l1 and l2 must be above 0")
        return self
