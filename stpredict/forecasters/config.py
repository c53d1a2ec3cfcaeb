"""Configs of the forecasters: models from frames to the frames that follow, without latents in between.

``size`` is that of a frame, in pixels or grid points; the names hid_S, hid_T, N_S and N_T are the papers'.
"""

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipeline.config import ClipChanges, ClipConfig, ClipDataConfig, Config, Location, StreamConfig
from stpredict.quantizers.config import AnyQuantizer


class TranslatorConfig(Config):
    """What every MetaFormer translator has."""

    mlp_ratio: float = Field(8.0, gt=1, description="hidden channels of each block's MLP, as a multiple")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block; it grows linearly from the first one's")


class GstaConfig(TranslatorConfig):
    """Gated spatiotemporal attention (SimVPv2)."""

    kind: Literal["gsta"] = "gsta"


class VitConfig(TranslatorConfig):
    kind: Literal["vit"] = "vit"


class SwinConfig(TranslatorConfig):
    kind: Literal["swin"] = "swin"
    masked: bool = Field(
        True, description="shifted windows see no pixels from the other side of the frame; published weights: false"
    )


class UniFormerConfig(TranslatorConfig):
    kind: Literal["uniformer"] = "uniformer"


class MlpMixerConfig(TranslatorConfig):
    kind: Literal["mlp_mixer"] = "mlp_mixer"


class ConvMixerConfig(Config):
    """It has no MLP and no drop path."""

    kind: Literal["conv_mixer"] = "conv_mixer"


class PoolFormerConfig(TranslatorConfig):
    kind: Literal["poolformer"] = "poolformer"


class ConvNextConfig(TranslatorConfig):
    kind: Literal["convnext"] = "convnext"


class VanConfig(TranslatorConfig):
    kind: Literal["van"] = "van"


class HorNetConfig(TranslatorConfig):
    kind: Literal["hornet"] = "hornet"


class MogaNetConfig(TranslatorConfig):
    kind: Literal["moganet"] = "moganet"


class TauConfig(TranslatorConfig):
    """Temporal attention unit."""

    kind: Literal["tau"] = "tau"


class IncepUConfig(Config):
    """SimVP's first translator: grouped convolutions of several sizes in a U."""

    kind: Literal["incepu"] = "incepu"
    kernels: tuple[PositiveInt, ...] = Field((3, 5, 7, 11), min_length=1)
    groups: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _kernels_are_odd(self):
        if even := [kernel for kernel in self.kernels if kernel % 2 == 0]:
            raise ValueError(f"kernels {even}: features stay in their place under odd ones alone")
        return self


AnyTranslator = Annotated[
    GstaConfig
    | IncepUConfig
    | VitConfig
    | SwinConfig
    | UniFormerConfig
    | MlpMixerConfig
    | ConvMixerConfig
    | PoolFormerConfig
    | ConvNextConfig
    | VanConfig
    | HorNetConfig
    | MogaNetConfig
    | TauConfig,
    Field(discriminator="kind"),
]


class ForecasterConfig(Config):
    """What every forecaster takes and gives."""

    channels: int = Field(1, ge=1, description="of a frame, or variables of a field")
    input_frames: int = Field(10, ge=1)
    output_frames: int = Field(10, ge=1, description="more than input_frames: predictions are predicted on from")
    size: tuple[PositiveInt, PositiveInt] = Field((64, 64), description="height and width of a frame")

    padding: Literal["replicate", "refuse"] = Field(
        "replicate", description="of frames whose sides the strides do not divide; what is added is cut off again"
    )

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels of a frame's side that become one on the coarser grid on which frames are seen."""

    @property
    def clip(self) -> dict[str, object]:
        """Keys of the clips that it is trained on."""
        return {"frames": self.input_frames + self.output_frames, "size": self.size}

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of that grid."""
        height, width = self.size
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def padding_note(self) -> str | None:
        """What is to be said of frames that are padded; None where none are."""
        (height, width), seen = self.size, tuple(self.stride * side for side in self.grid)
        if seen == self.size:
            return None
        return (
            f"frames of {height}x{width} are seen as {seen[0]}x{seen[1]}: their last row and column are repeated until "
            f"{self.stride} divides the sides, and what is predicted there is cut off (padding: refuse makes this an "
            "error)"
        )

    @model_validator(mode="after")
    def _strides_divide(self):
        height, width = self.size
        if self.padding == "refuse" and (height % self.stride or width % self.stride):
            raise ValueError(
                f"size {height}x{width}: sides must be multiples of {self.stride}; or take padding replicate"
            )
        return self


class SimVPConfig(ForecasterConfig):
    """SimVP and SimVPv2: encoder, translator, decoder. The defaults are SimVPv2's on Moving MNIST: 46,769,665
    parameters."""

    kind: Literal["simvp"] = "simvp"
    hid_S: int = Field(64, ge=2, multiple_of=2, description="channels of encoder and decoder")
    hid_T: int = Field(512, ge=2, description="channels of the translator")
    N_S: int = Field(4, ge=2, multiple_of=2, description="convolutions of the encoder, as many of the decoder")
    N_T: int = Field(8, ge=2, description="blocks of the translator")
    translator: AnyTranslator = GstaConfig()
    quantizer: AnyQuantizer | None = None

    @property
    def stride(self) -> int:
        return 2 ** (self.N_S // 2)


class ScheduledSamplingConfig(Config):
    """How often a recurrent forecaster sees, in training, a true frame in the place of its own prediction of it (Bengio
    et al. 2015, arXiv:1506.03099). The defaults are those of every published comparison."""

    start: float = Field(1.0, ge=0, le=1, description="share of the frames before the first step")
    decrease: float = Field(2e-5, ge=0, description="of that share in every step, the first one too")
    stop: int = Field(50_000, ge=0, description="step from which it sees its own predictions alone")

    def share(self, step: int) -> float:
        """Of the frames of step ``step`` (the first is 0)."""
        return max(0.0, self.start - self.decrease * (step + 1)) if step < self.stop else 0.0


class RecurrentConfig(ForecasterConfig):
    """Recurrent layers over a frame's patches, which predict frame after frame."""

    hidden: tuple[PositiveInt, ...] = Field((128, 128, 128, 128), min_length=1, description="channels of each layer")
    kernel: int = Field(5, ge=1, description="sides of the cells' convolutions, odd")
    patch: int = Field(4, ge=1, description="side of the squares of pixels that become channels")
    scheduled_sampling: ScheduledSamplingConfig = ScheduledSamplingConfig()

    @property
    def stride(self) -> int:
        return self.patch

    @model_validator(mode="after")
    def _kernel_is_odd(self):
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: frames keep their size under odd ones alone")
        return self


class ConvLstmConfig(RecurrentConfig):
    """ConvLSTM (Shi et al. 2015). Published are 4 layers of 64 (small), 128 and 192 (large) channels."""

    kind: Literal["conv_lstm"] = "conv_lstm"


class PredRnnConfig(RecurrentConfig):
    """PredRNN (Wang et al. 2017): a second memory goes up through the layers, and on from the last to the first. The
    defaults are the published ones on Moving MNIST: 23,838,720 parameters."""

    kind: Literal["pred_rnn"] = "pred_rnn"

    @model_validator(mode="after")
    def _memory_fits_every_layer(self):
        if len(set(self.hidden)) > 1:
            raise ValueError(f"hidden {list(self.hidden)}: one memory goes through all layers; give all the same")
        return self


AnyForecaster = Annotated[SimVPConfig | ConvLstmConfig | PredRnnConfig, Field(discriminator="kind")]


class UnitScaling(Config):
    """Frames in [0, 1]: uint8 over 255."""

    kind: Literal["unit"] = "unit"


class StandardScaling(Config):
    """(x - mean) / standard deviation of each channel, by the statistics of the manifest."""

    kind: Literal["standard"] = "standard"
    statistics: Literal["train", "own"] = Field(
        "train", description="own: each split by its own, as the published weather results do"
    )


class AffineScaling(Config):
    """(x - offset) / scale of each channel, or of all alike."""

    kind: Literal["affine"] = "affine"
    offset: tuple[float, ...] = Field((0.0,), min_length=1)
    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), min_length=1)


AnyScaling = Annotated[UnitScaling | StandardScaling | AffineScaling, Field(discriminator="kind")]


class ForecasterDataConfig(StreamConfig):
    """Clips of the model's input and output frames: ``shards`` is a shard job's run, or several in braces."""

    shards: Location
    clip: ClipChanges = Field(ClipChanges(), description="frames, size and channels are the model's")
    scaling: AnyScaling | None = Field(None, description="default: unit for uint8, standard for float32")
    validation: Literal["val", "test"] = Field("val", description="split; test as published code validates, by name")
    made_with: str | None = Field(None, description="how the shards are made: said where they are missing")

    def clips(self, model: ForecasterConfig) -> ClipDataConfig:
        """The clips that ``model`` sees. ValueError where that is no clip."""
        changes = self.clip.model_dump(exclude_none=True)
        fixed = {"channels": 3 if model.channels == 3 else 1} | model.clip
        for name, of_model in fixed.items():
            if changes.get(name, of_model) != of_model:
                raise ValueError(
                    f"data.clip.{name} {changes[name]}: {of_model} by the model; leave it out, or change the model"
                )
        clip = ClipConfig(**{"resize": "stretch"} | changes | fixed)
        fields = {name: getattr(self, name) for name in StreamConfig.model_fields}
        return ClipDataConfig(**fields, shards=self.shards, clip=clip)


class ForecastDataConfig(StreamConfig):
    """Held-out clips for a trained forecaster: ``shards`` is a shard job's run, or several in braces."""

    shards: Location
    split: Literal["val", "test", "train"] | None = Field(None, description="default: test where there is one, or val")
    clip: ClipChanges = Field(ClipChanges(), description="where it differs from what the forecaster was trained on")


class ForecasterLossConfig(Config):
    """Weights of the errors of scaled values, means over everything. SVQ is trained with MAE, SimVP with MSE."""

    mse: float = Field(1.0, ge=0)
    mae: float = Field(0.0, ge=0)
    differential_divergence: float = Field(
        0.0, ge=0, description="TAU's: KL divergence of the softmax of frame differences; published: 0.1"
    )
    temperature: float = Field(0.1, gt=0, description="of that softmax")
    commitment: float = Field(1.0, ge=0, description="of what the quantizer adds, where it adds any")

    @model_validator(mode="after")
    def _something_is_learned(self):
        if not self.mse and not self.mae:
            raise ValueError("mse and mae are both 0: give one of them a weight")
        return self
