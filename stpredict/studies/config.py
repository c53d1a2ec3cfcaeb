"""Configs of what is made of a study's runs. Torch-free."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.config import Config

#: What an axis of a grid is to the analysis: its values are models of other sizes, repetitions with other random
#: numbers, learning rates to choose from, amounts of training; or something to compare (``other``).
Role = Literal["size", "seed", "lr", "data", "other"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Of validations: no law of losses falls to them.
NO_LOSSES = ("psnr", "ssim", "accuracy", "codes_used", "codebook_perplexity", "codebook_entropy_bits")


class AnalysisConfig(Config):
    """How laws are fitted to a study's runs."""

    metric: str | None = Field(
        None, description="of the validation, the less the better (default: a prior's cross_entropy, else mse)"
    )
    points: Literal["final", "curve"] = Field(
        "final",
        description="final: each run's last validation; curve: all of them after warm-up, which means something only "
        "where the learning rate does not fall (schedule.kind constant)",
    )
    curve_from: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of a run's steps before which its curve is no part of L(D) and L(N, D): early losses fall "
        "in other ways",
    )
    parameters: Literal["all", "without_embeddings"] = Field("all", description="what N counts")
    predict: tuple[Positive, ...] = Field((), description="N of larger models whose loss is to be extrapolated")
    predict_tokens: tuple[Positive, ...] = Field(
        (), description="D of those, by the joint law (default: the largest that was fitted)"
    )
    bootstrap: int = Field(1000, ge=0, description="draws behind the intervals; 0: no intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")

    @model_validator(mode="after")
    def _can_be_done(self):
        if self.metric in NO_LOSSES:
            raise ValueError(f"metric {self.metric}: laws take what is less the better, such as mse")
        tails = round(2 / (1 - self.confidence))
        if 0 < self.bootstrap < tails:
            raise ValueError(
                f"bootstrap {self.bootstrap}: so few draws have no {100 * self.confidence:g}% interval; give "
                f"{tails} or more, or 0 for none"
            )
        return self


class TrialConfig(Config):
    """One point of a study's grid: its place on each axis, and the run of each of its jobs."""

    at: dict[str, str] = Field(description="axis → label")
    runs: dict[str, Path] = Field(description="job → run directory")
