"""Weights of the losses that a tokenizer is trained with."""

from pydantic import Field, model_validator

from data_pipeline.config import Config


class ReconstructionLossConfig(Config):
    """Weighted sum of mean absolute and mean squared error between the clip and its reconstruction."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _something(self):
        if not self.l1 and not self.l2:
            raise ValueError("one of l1 and l2 must be above 0")
        return self
