"""The clips that a trained tokenizer is used on: those it was trained on, unless the config says otherwise."""

from pathlib import Path

from data_pipeline.config import ClipDataConfig
from stpredict.exports import TokenizerExport
from stpredict.jobs.config import TokenizedClipDataConfig


def clips_for(data: TokenizedClipDataConfig, tokenizer: Path, export: TokenizerExport) -> ClipDataConfig:
    """``data`` with its clip filled in. UsageError where the tokenizer cannot take such clips."""
    clip = data.clip or export.clip
    export.model.check_clip(clip, f"data.clip, for {tokenizer}")
    return ClipDataConfig(**{**dict(data), "clip": clip})
