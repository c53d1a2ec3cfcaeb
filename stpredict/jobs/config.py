"""One config class per job. ``kind`` says which job it is; ``run`` is the run directory it fills."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.config import ClipConfig, ClipDataConfig, Config, LatentDataConfig, Source
from stpredict.losses.config import ReconstructionLossConfig
from stpredict.priors.config import NextBlockConfig
from stpredict.sampling.config import SamplingConfig
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.config import TrainingConfig


class Resources(Config):
    """What a job runs on: ``processes`` ranks in all, ``threads`` CPU threads each (default: cores / processes)."""

    processes: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)


class JobConfig(Config):
    run: Path = Field(description="run directory")
    seed: int = 0
    resources: Resources = Resources()


class PartedJobConfig(JobConfig):
    """A job that several jobs may do together: each of ``parts`` jobs, given the same config but for ``part``, writes
    its share of the shards of one set into ``run``; `stpredict merge` then makes the set readable.

    A part keeps its status and logs in ``run/parts/``, so that the parts can run at once.
    """

    part: int = Field(0, ge=0, description="which of the parts this job does, from 0")
    parts: int = Field(1, ge=1, description="jobs that write this set together")


class ShardConfig(PartedJobConfig):
    """Data set → WebDataset shards: fills ``run/train`` and ``run/val`` with tars and a manifest each."""

    kind: Literal["shard"] = "shard"
    source: Source
    max_shards: int = Field(96, ge=1, description="shards per split, where there are enough samples")
    min_samples_per_shard: int = Field(4, ge=1)
    window_bytes: int = Field(16 * 2**20, ge=1, description="upper bound of a shuffle window")


class TokenizerJobConfig(JobConfig):
    """Trains a tokenizer on clips."""

    kind: Literal["tokenizer"] = "tokenizer"
    data: ClipDataConfig
    model: CausalCnnConfig = CausalCnnConfig()
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    training: TrainingConfig


class TokenizedClipDataConfig(ClipDataConfig):
    """Clips for a trained tokenizer."""

    clip: ClipConfig | None = Field(None, description="default: as the tokenizer was trained on")


class EncodeConfig(PartedJobConfig):
    """Caches the latents of every clip: fills ``run/train`` and ``run/val`` with latent shards."""

    kind: Literal["encode"] = "encode"
    tokenizer: Path = Field(description="run or export of a tokenizer")
    data: TokenizedClipDataConfig
    passes: int = Field(1, ge=1, description="times every video is visited; with random starts each gives another clip")
    batch_size: int = Field(8, ge=1, description="clips per rank and forward")
    clips_per_member: int = Field(64, ge=1)
    shards: int = Field(96, ge=1, description="shards of the training split, where there are enough clips")


class PriorJobConfig(JobConfig):
    """Trains a prior on cached latents."""

    kind: Literal["prior"] = "prior"
    data: LatentDataConfig
    tokenizer: Path = Field(description="run or export of the tokenizer that made the latents and will decode samples")
    given_frames: int = Field(5, ge=1, description="frames given in the pictures of predictions")
    model: NextBlockConfig = NextBlockConfig()
    training: TrainingConfig


class GenerateConfig(JobConfig):
    """Continues videos: the first ``given_frames`` of each clip are given, the rest is predicted."""

    kind: Literal["generate"] = "generate"
    prior: Path = Field(description="run or export of a prior")
    tokenizer: Path = Field(description="run or export of its tokenizer")
    data: TokenizedClipDataConfig
    given_frames: int = Field(5, ge=1)
    clips: int = Field(32, ge=1, description="held-out clips to continue (all of them if there are fewer)")
    batch_size: int = Field(16, ge=1, description="clips per rank and forward")
    sampling: SamplingConfig = SamplingConfig()
    pictures: int = Field(8, ge=0, description="clips written as .mp4 and .gif beside the truth")


class EvaluateConfig(JobConfig):
    """PSNR, SSIM and MSE of generated frames, beside repeating the last given frame and the reconstruction."""

    kind: Literal["evaluate"] = "evaluate"
    generated: Path = Field(description="run of a generate job")


class ReportConfig(JobConfig):
    """One self-contained HTML page about ``runs``."""

    kind: Literal["report"] = "report"
    title: str = "stpredict report"
    runs: dict[str, Path] = Field(description="name → run directory, in the order shown")


AnyJobConfig = Annotated[
    ShardConfig | TokenizerJobConfig | EncodeConfig | PriorJobConfig | GenerateConfig | EvaluateConfig | ReportConfig,
    Field(discriminator="kind"),
]
