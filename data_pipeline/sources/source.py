"""A data set family as a list of videos: ``walk`` picks the module that knows its layout. Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.config import FolderSource, MovingDigitsSource, Source

Split = Literal["train", "val"]


@dataclass(frozen=True)
class SourceSample:
    """One video file of a data set.

    ``key`` is unique in the data set, always the same and without a dot (WebDataset cuts names there); ``name`` is
    what the data set calls the video; ``label`` its class, where it has one; ``metadata`` goes into KEY.json.
    """

    key: str
    path: Path
    split: Split
    label: str | None
    name: str
    metadata: dict[str, Any] = field(default_factory=dict)


def walk(config: Source, workdir: Path, progress: Callable[[int, int], None] | None = None) -> list[SourceSample]:
    """The videos of both splits, in a fixed order. Sources that make their videos write them under ``workdir``;
    ``progress`` (done, total) counts those. UsageError says what is missing, where, and what to do."""
    from data_pipeline.sources import folder, moving_digits

    match config:
        case FolderSource():
            return folder.walk(config)
        case MovingDigitsSource():
            return moving_digits.walk(config, workdir, progress)
