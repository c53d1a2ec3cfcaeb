"""Configs of what is made of a study's runs. Torch-free."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat

from data_pipeline.config import Config

#: What an axis of a grid is to the analysis: its values are models of other sizes, repetitions with other random
#: numbers, learning rates to choose from, amounts of training; or something to compare (``other``).
Role = Literal["size", "seed", "lr", "data", "other"]


class AnalysisConfig(Config):
    """How laws are fitted to a study's runs."""

    metric: str | None = Field(None, description="of the validation (default: a prior's cross_entropy, else mse)")
    points: Literal["final", "curve"] = Field(
        "final",
        description="final: each run's last validation; curve: all of them after warm-up, which means something only "
        "where the learning rate does not fall (schedule.kind constant)",
    )
    parameters: Literal["all", "without_embeddings"] = Field("all", description="what N counts")
    predict: tuple[PositiveFloat, ...] = Field((), description="N of larger models whose loss is to be extrapolated")
    predict_tokens: tuple[PositiveFloat, ...] = Field(
        (), description="D of those, by the joint law (default: the largest that was fitted)"
    )
    bootstrap: int = Field(1000, ge=0, description="draws behind the intervals; 0: no intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")


class TrialConfig(Config):
    """One point of a study's grid: its place on each axis, and the run of each of its jobs."""

    at: dict[str, str] = Field(description="axis → label")
    runs: dict[str, Path] = Field(description="job → run directory")
