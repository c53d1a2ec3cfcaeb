"""Configs of the training engine."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from data_pipeline.config import Config
from data_pipeline.errors import UsageError
from stpredict.training.computing import ActivationCheckpointingConfig, DeepSpeedSettings, OffloadConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    kind: Literal["adam", "adamw", "sgd"] = Field("adamw", description="sgd: plain, without momentum")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of adam and adamw")
    eps: float = Field(1e-8, gt=0, description="of adam and adamw")
    weight_decay: float = Field(0.0, ge=0, description="of matrices and convolutions; norms and slopes never decay")


class DiscriminatorConfig(Config):
    """How a model's discriminator is trained. ``training.schedule`` shapes its learning rate too."""

    optimizer: OptimizerConfig = OptimizerConfig()
    # Left out where they are as they always were: runs that are older than the keys can be continued.
    start: int = Field(
        0,
        ge=0,
        exclude_if=lambda value: value == 0,
        description="step (the first is 0) from which the model is judged and the discriminator learns",
    )
    every: int = Field(
        1, ge=1, exclude_if=lambda value: value == 1, description="steps per update of the discriminator"
    )
    model_every: int = Field(
        1,
        ge=1,
        exclude_if=lambda value: value == 1,
        description="steps per update of the model, from `start` on (WGAN's n_critic)",
    )
    adaptive_weight: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="VQGAN's: adversarial gradients as large as the others'",
    )

    @model_validator(mode="after")
    def _somebody_learns(self):
        if self.every > 1 and self.model_every > 1:
            raise ValueError(
                f"every {self.every} and model_every {self.model_every}: on some steps nobody would learn; "
                "leave one of them at 1"
            )
        return self


class OneCycleConfig(Config):
    """Names and defaults of torch.optim.lr_scheduler.OneCycleLR (Smith & Topin, arXiv:1708.07120): cosines up from the
    peak / ``div_factor``, and down to that / ``final_div_factor``."""

    pct_start: float = Field(0.3, ge=0, le=1, description="share of all steps in which the learning rate rises")
    div_factor: float = Field(25.0, ge=1)
    final_div_factor: float = Field(1e4, ge=1)
    cycle_momentum: bool = Field(True, description="Adam's first beta goes the other way; optimizer.betas[0] is unused")
    base_momentum: float = Field(0.85, ge=0, lt=1, description="at the peak of the learning rate")
    max_momentum: float = Field(0.95, ge=0, lt=1, description="at both ends")


class ScheduleConfig(Config):
    """Learning rate over the steps: linear warm-up, then ``kind`` down to ``final`` times the peak; or one_cycle."""

    kind: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="share of all steps")
    final: float = Field(0.0, ge=0, le=1)
    # Left out where there is none: runs that are older than the key are runs without.
    one_cycle: OneCycleConfig | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="before")
    @classmethod
    def _one_cycle_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "one_cycle" and values.get("one_cycle") is None:
            return {**values, "one_cycle": {}}
        return values

    @model_validator(mode="after")
    def _one_warmup(self):
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.kind != "one_cycle" and self.one_cycle:
            raise ValueError(f"kind is {self.kind}: the keys of one_cycle go with kind one_cycle")
        if self.kind == "one_cycle":
            theirs = ("warmup_steps", "warmup_ratio", "final")
            if given := [key for key in theirs if getattr(self, key)]:
                raise ValueError(
                    f"one_cycle rises and ends by one_cycle.pct_start, div_factor and final_div_factor: leave out "
                    f"{' and '.join(given)}"
                )
        return self


class BestConfig(Config):
    """The checkpoints that were best in validation."""

    metric: str = Field(description="a metric of the validation, such as psnr")
    mode: Literal["max", "min"] = "max"
    keep: int = Field(1, ge=1, description="best checkpoints kept")


class EarlyStoppingConfig(Config):
    """Training ends when a metric of the validation has not become better for a while."""

    metric: str = Field(description="a metric of the validation, such as psnr")
    mode: Literal["max", "min"] = "max"
    patience: int = Field(5, ge=1, description="validations in a row without improvement, after which training ends")
    min_delta: float = Field(0.0, ge=0, description="what is better by no more than this is no improvement")


class CheckpointConfig(Config):
    every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int | None = Field(None, ge=1, description="checkpoints of every so many steps are kept for ever")
    best: BestConfig | None = None
    max_bytes: ByteSize | None = Field(None, ge=1, description="disk for the run's checkpoints and export, as 500GB")
    background: bool = Field(True, description="train on while a copy in host memory is written")
    on_failure: Literal["stop", "continue"] = Field(
        "stop", description="when a checkpoint cannot be written; the last one always must"
    )


class ProfileConfig(Config):
    """Steps whose computations are timed one by one (torch.profiler)."""

    step: int = Field(ge=1, description="the first one; after warm-up, such as 20")
    steps: int = Field(3, ge=1)


class WandbConfig(Config):
    """A run of Weights & Biases that shows what metrics.jsonl holds."""

    project: str
    entity: str | None = Field(None, description="user or team; default: that of the login")
    name: str | None = Field(None, description="default: the run directory's")
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"


class SpikeConfig(Config):
    """A step whose loss is far above those before it."""

    threshold: float = Field(
        10.0, gt=0, description="how far above their median, in deviations (1.4826 x median absolute deviation)"
    )
    window: int = Field(100, ge=10, description="steps before it that are compared")
    action: Literal["warn", "skip"] = Field("warn", description="skip: such a step changes nothing, and is a bad one")


class GuardsConfig(Config):
    """What is done when something goes wrong. A bad step, whose loss or gradient is not finite, is skipped."""

    # Left out where they are as they always were: runs that are older than the keys can be continued.
    max_bad_steps: int = Field(
        5, ge=1, exclude_if=lambda value: value == 5, description="bad steps in a row: back to the last checkpoint"
    )
    spike: SpikeConfig | None = Field(None, exclude_if=lambda value: value is None)
    max_rollbacks: int = Field(3, ge=1, description="times that one checkpoint is gone back to")
    hang_timeout_s: float | None = Field(1800, gt=0, description="without any rank moving: the training ends")
    slow_rank: float | None = Field(1.5, gt=1, description="times the median rank's time, from which a rank is named")


class TrainingConfig(Config):
    """One training run: ``batch_size`` counts samples over all ranks and accumulation steps."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples per rank and forward; default: no accumulation"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    accumulation_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        exclude_if=lambda value: value == "fp32",  # runs that are older than the key are runs with it
        description="in which gradients are added up over micro-batches and ranks; fp32 or that of precision",
    )
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: OffloadConfig = OffloadConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile of each layer; auto: on CUDA, up to ZeRO-2, not with policy selective"
    )
    deepspeed: DeepSpeedSettings = Field({}, description="DeepSpeed's own settings: bucket sizes, overlap_comm, ...")
    deterministic: bool = Field(False, description="on CUDA: kernels that give the same bits every time, slower")
    clip_norm: float | None = Field(1.0, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator: DiscriminatorConfig = Field(DiscriminatorConfig(), description="of models that train one")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep an average of the weights; exports hold it")
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    # Left out where it is as it always was: runs that are older than the key can be continued.
    export: Literal["last", "best"] = Field(
        "last",
        exclude_if=lambda value: value == "last",
        description="which checkpoint becomes the run's export; best: by checkpoint.best",
    )
    # Left out where there is none: runs that are older than the key are runs without.
    early_stopping: EarlyStoppingConfig | None = Field(
        None, exclude_if=lambda value: value is None, description="end when validation is no longer getting better"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl and TensorBoard")
    validate_every: int = Field(500, ge=1, description="steps between validations")
    picture_every: int = Field(500, ge=1, description="steps between TensorBoard pictures")
    validate_with: Literal["averages", "weights"] = Field(
        "averages", description="what validation and pictures use where ema_decay keeps averages, as exports do"
    )
    histogram_every: int | None = Field(
        None, ge=1, description="steps between TensorBoard histograms of weights and gradient momenta"
    )
    profile: ProfileConfig | None = None
    wandb: WandbConfig | None = None
    peak_tflops: float | None = Field(
        None, gt=0, description="TFLOP/s that one rank's hardware can do, for MFU; default: a table of GPUs"
    )

    def accumulation_steps(self, ranks: int) -> int:
        """Micro-batches per rank and step. UsageError where the batch does not divide, naming what does."""
        per_rank = self.batch_size // ranks
        if self.batch_size % ranks:
            near = sorted({max(1, per_rank) * ranks, (per_rank + 1) * ranks})
            those = [size for size in range(1, self.batch_size + 1) if self.batch_size % size == 0]
            raise UsageError(
                f"training.batch_size {self.batch_size} does not divide among {ranks} ranks: "
                f"{_or(those)} would do; or a batch_size of {_or(near)}"
            )
        micro = self.micro_batch_size or per_rank
        if per_rank % micro:
            raise UsageError(
                f"training.micro_batch_size {micro} does not divide the {per_rank} samples that each of {ranks} ranks "
                f"gets of batch_size {self.batch_size}"
            )
        return per_rank // micro

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and "discriminator_optimizer" in values and "discriminator" not in values:
            values = dict(values)
            values["discriminator"] = {"optimizer": values.pop("discriminator_optimizer")}
        return values

    @model_validator(mode="after")
    def _offload_is_sharded(self):
        if self.offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload.optimizer needs zero_stage 1, 2 or 3: ZeRO-0 keeps no state apart from the model")
        if self.offload.optimizer == "cpu" and self.optimizer.kind == "sgd":
            raise ValueError(
                "offload.optimizer cpu is Adam: use optimizer.kind adam or adamw, or offload.optimizer none"
            )
        if self.offload.parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload.parameters needs zero_stage 3, and it is {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _best_is_validated(self):
        if self.export == "best" and not self.checkpoint.best:
            raise ValueError("export is best: say by what, checkpoint.best")
        if self.checkpoint.best and self.checkpoint.every % self.validate_every:
            raise ValueError(
                f"checkpoint.best needs a validation at every checkpoint: checkpoint.every {self.checkpoint.every} "
                f"is no multiple of validate_every {self.validate_every}"
            )
        return self


def _or(numbers: list[int]) -> str:
    """1, 2, 4 or 8."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


class InitFromConfig(Config):
    """Weights and buffers that a training begins with; steps and optimizer begin anew."""

    path: Path = Field(description="run (its export), export, or folder of a checkpoint")
    only: tuple[str, ...] | None = Field(
        None, min_length=1, description="patterns of parameter names, such as encoder.*; default: all, which must fit"
    )
    ema: bool | None = Field(
        None, description="averages of the weights, or the weights themselves; default: averages where there are any"
    )


def _as_mapping(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


#: ``init_from: PATH`` is short for ``init_from: {path: PATH}``.
InitFrom = Annotated[InitFromConfig, BeforeValidator(_as_mapping)]
