"""One config class per job. ``kind`` says which job it is; ``run`` is the run directory it fills."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.config import ClipDataConfig, Config, Location, Source
from stpredict.forecasters.config import AnyForecaster, ForecastDataConfig, ForecasterDataConfig, ForecasterLossConfig
from stpredict.losses.config import LpipsConfig, TokenizerLossConfig
from stpredict.priors.config import LatentConfig, NextBlockConfig, PriorDataConfig
from stpredict.sampling.config import SamplingConfig
from stpredict.studies.config import AnalysisConfig, Role, TrialConfig
from stpredict.tokenizers.config import (
    TOKENIZED_TOGETHER,
    WHOLE,
    CausalCnnConfig,
    TilingConfig,
    TokenizedClipDataConfig,
)
from stpredict.training.config import InitFrom, TrainingConfig

PARTS = "parts"  # folder of a run
TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
# Of ``resources``: where a job runs and how long it may. What it makes depends on none of them.
RESOURCES = ("threads", "nodes", "memory_gb", "time")
FORCE = "STPREDICT_FORCE"  # environment variable: training continues under another config than it began with
# Of reading shards: how fast, and how much of it may fail. The order of the samples depends on none of them.
LOADING = ("data.workers", "data.timeout_s", "data.max_bad_fraction", "data.buffer_bytes", "data.cache")
# Of training: how its steps are computed and what is written beside them. The weights depend on none of them, but for
# rounding, and but for dropout where ``resources.processes`` changes.
COMPUTING = (
    "resources.processes",
    "model.attention",
    "training.zero_stage",
    "training.micro_batch_size",
    "training.offload",
    "training.activation_checkpointing",
    "training.compile",
    "training.deepspeed",
    "training.deterministic",
    "training.log_every",
    "training.validate_every",
    "training.picture_every",
    "training.validate_with",
    "training.histogram_every",
    "training.profile",
    "training.wandb",
    "training.peak_tflops",
    "training.checkpoint",
    "training.guards.max_rollbacks",
    "training.guards.hang_timeout_s",
    "training.guards.slow_rank",
)


def minutes(time: str) -> int:
    """Minutes, rounded up, of a time as SLURM writes it, [D-]HH:MM:SS."""
    days, hours, minutes, seconds = (int(part or 0) for part in TIME.fullmatch(time).groups())
    return math.ceil(days * 1440 + hours * 60 + minutes + seconds / 60)


def _time_limit(time: Any) -> Any:
    if not isinstance(time, str) or not TIME.fullmatch(time) or minutes(time) == 0:  # YAML takes 24:00:00 for a number
        raise ValueError(f"{time!r} is no time limit; write HH:MM:SS or D-HH:MM:SS, in quotes")
    return time


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]


class Resources(Config):
    """What a job runs on: ``processes`` ranks in all, ``threads`` CPU threads each (default: cores / processes). The
    others are for SLURM, which otherwise takes them from the cluster's profile."""

    processes: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    nodes: int | None = Field(
        None, ge=1, description="nodes that share the ranks evenly (default: as few as hold them)"
    )
    memory_gb: float | None = Field(None, gt=0, description="of each node")
    time: TimeLimit | None = Field(None, description="limit of one start, [D-]HH:MM:SS in quotes")


def _folder(run: Any) -> Any:
    if "://" in str(run):
        raise ValueError("a run directory is a folder, not a URL; copy its contents to the object store afterwards")
    return run


class JobConfig(Config):
    run: Annotated[Path, BeforeValidator(_folder)] = Field(description="run directory")
    seed: int = 0
    resources: Resources = Resources()

    #: Keys, with those below them, that change nothing in what the job makes: it may be continued with others.
    harmless: ClassVar[tuple[str, ...]] = ("run", *(f"resources.{key}" for key in RESOURCES))
    #: Asked for again, it is done again, though it is done: it is about others, that may have gone on.
    repeatable: ClassVar[bool] = False

    @property
    def home(self) -> Path:
        """The directory of this job's own config, status, logs and lock."""
        return self.run

    def check_ranks(self, ranks: int) -> None:
        """UsageError where so many cannot do the job. Asked before anything is written."""

    @classmethod
    def decisive(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Those of ``values``, by their dotted keys, that are not harmless."""
        below = tuple(f"{key}." for key in cls.harmless)
        return {key: value for key, value in values.items() if not f"{key}.".startswith(below)}


class PartedJobConfig(JobConfig):
    """A job that several jobs may do together: each of ``parts`` jobs, given the same config but for ``part``, writes
    its share of the shards of one set into ``run``; `stpredict merge` then makes the set readable.

    Shard i is written by part i mod ``parts``. A part has its config, status, logs and lock in ``home``, so that the
    parts can run at once.
    """

    part: int = Field(0, ge=0, description="which of the parts this job does, from 0")
    parts: int = Field(1, ge=1, description="jobs that write this set together")

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, "resources.processes")

    @property
    def home(self) -> Path:
        return self.run if self.parts == 1 else self.run / PARTS / f"{self.part}-of-{self.parts}"

    @property
    def whole(self) -> Self:
        """The job that all parts are together."""
        return self.model_copy(update={"part": 0, "parts": 1})

    @model_validator(mode="after")
    def _part_of_parts(self) -> Self:
        if self.part >= self.parts:
            raise ValueError(f"part is {self.part}: of {self.parts} parts, the last is {self.parts - 1}")
        return self


class ShardConfig(PartedJobConfig):
    """Data set → WebDataset shards: fills ``run/train`` and ``run/val`` with tars and a manifest each."""

    kind: Literal["shard"] = "shard"
    source: Source
    max_shards: int = Field(96, ge=1, description="shards per split, where there are enough samples")
    min_samples_per_shard: int = Field(4, ge=1)
    window_bytes: int = Field(16 * 2**20, ge=1, description="upper bound of a shuffle window")
    workers: int = Field(1, ge=1, description="processes per rank that read and probe samples")
    timeout_s: float = Field(600, gt=0, description="a sample that takes longer is left out; all of a video is decoded")

    harmless: ClassVar[tuple[str, ...]] = (*PartedJobConfig.harmless, "workers")


class TrainingJobConfig(JobConfig):
    training: TrainingConfig
    # Left out where there is none: runs that are older than the key are runs without.
    init_from: InitFrom | None = Field(
        None, exclude_if=lambda value: value is None, description="run, export or checkpoint to take weights from"
    )

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, *LOADING, *COMPUTING)

    @classmethod
    def decisive(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Under the names that they had first: runs, and what is made of them, are still theirs.
        new, old = "training.discriminator.optimizer.", "training.discriminator_optimizer."
        found = super().decisive(values).items()
        return {f"{old}{key.removeprefix(new)}" if key.startswith(new) else key: value for key, value in found}

    def check_ranks(self, ranks: int) -> None:
        self.training.accumulation_steps(ranks)


class TokenizerJobConfig(TrainingJobConfig):
    """Trains a tokenizer on clips."""

    kind: Literal["tokenizer"] = "tokenizer"
    data: ClipDataConfig
    model: CausalCnnConfig = CausalCnnConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()

    @model_validator(mode="after")
    def _adaptive_weight_needs_pixels(self) -> Self:
        if self.loss.adversarial and self.training.discriminator.adaptive_weight and self.model.patch > 1:
            raise ValueError(
                "training.discriminator.adaptive_weight needs a last layer that makes pixels: with model.patch "
                f"{self.model.patch} they are folded into its channels; leave one of the two out"
            )
        return self


class EncodeConfig(PartedJobConfig):
    """Caches the latents of every clip: fills ``run/train`` and ``run/val`` with latent shards."""

    kind: Literal["encode"] = "encode"
    tokenizer: Path = Field(description="run or export of a tokenizer")
    data: TokenizedClipDataConfig
    passes: int = Field(1, ge=1, description="times every video is visited; with random starts each gives another clip")
    batch_size: int = Field(TOKENIZED_TOGETHER, ge=1, description="clips per forward; each has exactly so many")
    # Left out where there is none: runs that are older than the key are runs without.
    tiling: TilingConfig = Field(
        WHOLE, exclude_if=lambda value: value == WHOLE, description="for videos that do not fit in memory at once"
    )
    clips_per_member: int | None = Field(None, ge=1, description="default: by size, so that headers take 1 % at most")
    shards: int = Field(96, ge=1, description="shards of the training split, where there are enough clips")

    harmless: ClassVar[tuple[str, ...]] = (*PartedJobConfig.harmless, *LOADING)


class PriorJobConfig(TrainingJobConfig):
    """Trains a prior on cached latents, or on clips that are tokenized on the fly."""

    kind: Literal["prior"] = "prior"
    data: PriorDataConfig
    tokenizer: Path = Field(description="run or export of the tokenizer that made the latents and will decode samples")
    given_frames: int = Field(5, ge=0, description="frames given in the pictures of predictions")
    # Left out where it is 0: runs that are older than the key have loss on all that is predicted.
    loss_from: int = Field(
        0,
        ge=0,
        exclude_if=lambda value: value == 0,
        description="first latent frame whose tokens carry loss; 0: all that are predicted, given frames among them",
    )
    # Left out where there is none: runs that are older than the key are runs without.
    latent: LatentConfig | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="what the latents are to be: others are refused, and `estimate` needs none that are there",
    )
    model: NextBlockConfig = NextBlockConfig()


class ForecasterJobConfig(TrainingJobConfig):
    """Trains a forecaster on clips: its input frames, and the output frames that follow."""

    kind: Literal["forecaster"] = "forecaster"
    data: ForecasterDataConfig
    model: AnyForecaster
    loss: ForecasterLossConfig = ForecasterLossConfig()

    @model_validator(mode="after")
    def _clips_are_whole(self) -> Self:
        self.data.clips(self.model)
        return self

    @model_validator(mode="after")
    def _differences_are_there(self) -> Self:
        if self.loss.differential_divergence and self.model.output_frames == 1:
            raise ValueError("loss.differential_divergence: of one output frame there are no differences; set it to 0")
        return self


class GenerateConfig(JobConfig):
    """Continues videos: the first ``given_frames`` of each clip are given, the rest is predicted. With ``given_frames``
    0, makes videos from nothing: a prior must be trained for that, and may be told ``classes``."""

    kind: Literal["generate"] = "generate"
    prior: Path = Field(description="run or export of a prior")
    tokenizer: Path = Field(description="run or export of its tokenizer")
    # Left out where there is none, as in runs that are older than that.
    data: TokenizedClipDataConfig | None = Field(
        None, exclude_if=lambda value: value is None, description="the clips to continue, where frames are given"
    )
    given_frames: int = Field(5, ge=0)
    classes: tuple[str, ...] = Field(
        (),
        exclude_if=lambda value: not value,
        description="to make videos of from nothing; default: all of the prior",
    )
    clips: int = Field(32, ge=1, description="to make, or held-out ones to continue (all of them if there are fewer)")
    batch_size: int = Field(16, ge=1, description="clips per rank and forward")
    sampling: SamplingConfig = SamplingConfig()
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        exclude_if=lambda value: value == "fp32",
        description="of the prior: bf16 reads half as much a step, and what it rounds may depend on the batch",
    )
    # Left out where there is none: runs that are older than the key are runs without.
    tiling: TilingConfig = Field(
        WHOLE, exclude_if=lambda value: value == WHOLE, description="of the tokenizer, for videos too large for it"
    )
    pictures: int = Field(8, ge=0, description="clips written as .mp4 and .gif beside the truth")

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, *LOADING)

    @model_validator(mode="after")
    def _given_or_not(self) -> Self:
        if self.given_frames and self.data is None:
            raise ValueError("data: the clips to continue are missing; for videos from nothing, set given_frames to 0")
        if self.data and not self.given_frames:
            raise ValueError("data: given_frames 0 makes videos from nothing; leave data out, or give some frames")
        if self.given_frames and self.classes:
            raise ValueError("classes: a clip that is continued has its own; they go with given_frames 0")
        return self


class ReconstructConfig(JobConfig):
    """Held-out clips through a tokenizer and back: what its reconstruction is judged by."""

    kind: Literal["reconstruct"] = "reconstruct"
    tokenizer: Path = Field(description="run or export of a tokenizer")
    data: TokenizedClipDataConfig
    clips: int | None = Field(None, ge=1, description="held-out clips (default: all)")
    batch_size: int = Field(TOKENIZED_TOGETHER, ge=1, description="clips per rank and forward")
    tiling: TilingConfig = Field(WHOLE, description="for videos that do not fit in memory at once")
    pictures: int = Field(8, ge=0, description="clips written as .mp4 and .gif beside the truth")

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, *LOADING)


class ForecastConfig(JobConfig):
    """What a forecaster makes of held-out clips, beside the truth: what it is judged by."""

    kind: Literal["forecast"] = "forecast"
    forecaster: Path = Field(description="run or export of a forecaster")
    data: ForecastDataConfig
    output_frames: int | None = Field(
        None, ge=1, description="horizon, where it is not that of the training; predictions are predicted on from"
    )
    swap: dict[Literal["encoder", "translator", "decoder"], Path] = Field(
        {}, description="parts whose weights come from another run or export of such a forecaster"
    )
    clips: int | None = Field(None, ge=1, description="held-out clips (default: all)")
    batch_size: int = Field(16, ge=1, description="clips per rank and forward")
    pictures: int = Field(8, ge=0, description="clips drawn beside the truth")

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, *LOADING)


class EvaluateConfig(JobConfig):
    """PSNR, SSIM and MSE of generated frames, beside repeating the last given frame and the reconstruction; of a
    tokenizer's reconstructions, with LPIPS and the use of the codebook; or of a forecaster's predictions by the field's
    metrics, per lead time, beside persistence and climatology."""

    kind: Literal["evaluate"] = "evaluate"
    generated: Path = Field(description="run of a generate, reconstruct or forecast job")
    # The others are left out where there are none: runs that are older than these keys are runs without.
    lpips: LpipsConfig | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="also LPIPS, of reconstructions and of forecasts of video; {} downloads VGG16, {network: alexnet} "
        "AlexNet",
    )
    climatology: Location | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="shards whose split train says what is usual: a yardstick for forecasts of fields",
    )
    quantizer_samples: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="also what the forecaster's quantizer does with so many of the samples: quantizer.json, pictures",
    )
    others: dict[str, Path] = Field(
        {}, exclude_if=lambda value: not value, description="name → run of another forecast of the same samples"
    )

    @model_validator(mode="after")
    def _names_are_free(self):
        if taken := [name for name in self.others if name in ("prediction", "persistence", "climatology")]:
            raise ValueError(f"others: {taken[0]} is the name of a row of the table already; give it another")
        return self


class ReportConfig(JobConfig):
    """One self-contained HTML page about ``runs``."""

    kind: Literal["report"] = "report"
    title: str = "stpredict report"
    runs: dict[str, Path] = Field(description="name → run directory, in the order shown")


class StudyReportConfig(JobConfig):
    """What the trials of a study found: curves, fitted laws, predictions, as one HTML page, pictures and tables.

    A page of what is there: it is written anew whenever it is asked for, under any config.
    """

    kind: Literal["study_report"] = "study_report"
    title: str = "study"
    axes: dict[str, Role] = Field(description="of the grid, and what each is")
    trials: dict[str, TrialConfig]
    analysis: AnalysisConfig = AnalysisConfig()

    harmless: ClassVar[tuple[str, ...]] = (*JobConfig.harmless, "title", "axes", "trials", "analysis", "seed")
    repeatable: ClassVar[bool] = True


AnyJobConfig = Annotated[
    ShardConfig
    | TokenizerJobConfig
    | EncodeConfig
    | PriorJobConfig
    | ForecasterJobConfig
    | GenerateConfig
    | ReconstructConfig
    | ForecastConfig
    | EvaluateConfig
    | ReportConfig
    | StudyReportConfig,
    Field(discriminator="kind"),
]
