"""Weights of the losses that a tokenizer is trained with."""

from pydantic import Field

from data_pipeline.config import Config


class ReconstructionLossConfig(Config):
    """Weighted sum of mean absolute and mean squared error between the clip and its reconstruction."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
