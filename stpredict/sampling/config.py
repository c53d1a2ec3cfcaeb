"""Configs of sampling."""

from pydantic import Field

from data_pipeline.config import Config


class SamplingConfig(Config):
    """Filters applied to every token's distribution before it is drawn; temperature 0 takes the likeliest token."""

    temperature: float = Field(1.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    guidance: float = Field(
        1.0,
        ge=0,
        # Left out where it is 1: runs that are older than the key had none.
        exclude_if=lambda value: value == 1,
        description="classifier-free guidance: logits without prefix + guidance x (those with it - those without it); "
        "1: those with it alone",
    )
