"""What a prior learns from: latents that were cached, or clips that are tokenized when they are needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from data_pipeline.config import ClipConfig, ClipSetConfig
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest
from data_pipeline.shard_set import read_set
from data_pipeline.stream import clip_batches, clip_evaluation_batches, latent_batches, latent_evaluation_batches
from stpredict.exports import TokenizerExport
from stpredict.priors.config import (
    CachedLatentsConfig,
    LatentConfig,
    NextBlockConfig,
    PriorDataConfig,
    TokenizedClipsConfig,
)
from stpredict.priors.prefixes import Prefixes, planned_prefixes, prefixes
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.clips import clip_for, clip_tokens, clips_for
from stpredict.training.task import Batch, Share, TrainingBatches


class TrainedTokenizer(NamedTuple):
    """What ``exports.load_tokenizer`` found at ``path``."""

    path: Path
    model: CausalCnnTokenizer
    export: TokenizerExport
    fingerprint: str


class PriorData(Protocol):
    """Clips as tokens of a grid (T', H', W') below ``codebook_size``, whichever way they come about."""

    grid: tuple[int, int, int]
    codebook_size: int
    clip: ClipConfig

    def training_batches(
        self, share: Share, consumed: Mapping[str, int], quarantined: dict[str, str]
    ) -> TrainingBatches:
        """Endless micro-batches of the training split; see ``data_pipeline.stream.clip_batches``."""

    def validation_batches(self, share: Share, quarantined: dict[str, str]) -> Iterator[Batch]:
        """Every validation sample once, with ``weight``; see ``data_pipeline.stream.clip_evaluation_batches``."""

    def tokens(self, batch: Batch) -> Tensor:
        """Token ids int64 ``(b, T', H', W')`` of a batch, on the device where the batch is."""

    def prefixes(self, model: NextBlockConfig) -> Prefixes | None:
        """Of the classes that a batch's ``label`` (b) int64 numbers (-1: none), where the model takes such; UsageError
        where the videos have no classes or sets that are mixed have others."""


class CachedLatents:
    """Latents that an encode job made. UsageError where they are not token ids of ``tokenizer``."""

    def __init__(self, config: CachedLatentsConfig, tokenizer: TrainedTokenizer, seed: int):
        self._config, self._seed = config, seed
        train = read_set(config.latents, "train").manifest
        val = read_set(config.latents, "val").manifest  # a missing one is said now, not at the first validation
        others = [(other.latents, read_set(other.latents, "train").manifest) for other in config.mix.values()]
        for where, manifest in [(config.latents, train), (f"{config.latents}/val", val), *others]:
            if manifest.kind != "latents":
                raise UsageError(f"{where}: holds {manifest.kind}, latents are needed; for clips say data.kind=clips")
            if manifest.fingerprint != tokenizer.fingerprint:
                raise UsageError(
                    f"{where}: made by another tokenizer (fingerprint {manifest.fingerprint[:12]}) than "
                    f"{tokenizer.path} ({tokenizer.fingerprint[:12]}); encode the clips again with this one"
                )
            if manifest.codebook_size is None:
                raise UsageError(f"{where}: holds {manifest.dtype} latents, this prior models token ids")
            if manifest.grid != train.grid:
                raise UsageError(
                    f"{where}: has a token grid of {manifest.grid}, {config.latents} one of {train.grid}; one prior "
                    "learns one grid, so encode both from clips of the same frames and size"
                )
        self.grid, self.codebook_size, self.clip = train.grid, train.codebook_size, train.clip or tokenizer.export.clip
        self.sets = {str(config.latents): train, f"{config.latents}/val": val, **{str(w): m for w, m in others}}

    def training_batches(
        self, share: Share, consumed: Mapping[str, int], quarantined: dict[str, str]
    ) -> TrainingBatches:
        return latent_batches(
            self._config, "train", seed=self._seed, share=share, consumed=consumed, quarantined=quarantined
        )

    def validation_batches(self, share: Share, quarantined: dict[str, str]) -> Iterator[Batch]:
        return latent_evaluation_batches(self._config, "val", share=share, quarantined=quarantined)

    def tokens(self, batch: Batch) -> Tensor:
        return batch["latent"]

    def prefixes(self, model: NextBlockConfig) -> Prefixes | None:
        return prefixes(model, _classes(self.sets)) if model.labelled else None


class TokenizedClips:
    """Clips through ``tokenizer``, which stays outside the trained model. The clips of a step's micro-batches stay
    uint8 until their turn comes. UsageError where the tokenizer cannot take such clips."""

    def __init__(self, config: TokenizedClipsConfig, tokenizer: TrainedTokenizer, seed: int):
        self._seed, self._batch_size, self._tokenizer = seed, config.batch_size, tokenizer.model
        export = tokenizer.export
        clips = clips_for(config, tokenizer.path, export)
        mix = {}
        for name, other in config.mix.items():
            clip = clip_for(other.clip, clips.clip, export, f"data.mix.{name}.clip, for {tokenizer.path}")
            mix[name] = ClipSetConfig(**{**dict(other), "clip": clip})
        self._clips = clips.model_copy(update={"mix": mix, "weight": config.weight})
        self.grid, self.codebook_size, self.clip = _grid(clips.clip, export), export.model.codebook_size, clips.clip
        for name, other in mix.items():
            if _grid(other.clip, export) != self.grid:
                raise UsageError(
                    f"data.mix.{name}.clip: makes a token grid of {_grid(other.clip, export)}, data.clip one of "
                    f"{self.grid}; one prior learns one grid"
                )
        val = read_set(config.shards, "val").manifest  # a missing one is said now, not at the first validation
        self.sets = {config.shards: read_set(config.shards, "train").manifest, f"{config.shards}/val": val}
        self.sets |= {other.shards: read_set(other.shards, "train").manifest for other in config.mix.values()}

    def training_batches(
        self, share: Share, consumed: Mapping[str, int], quarantined: dict[str, str]
    ) -> TrainingBatches:
        return clip_batches(
            self._clips, "train", seed=self._seed, share=share, consumed=consumed, quarantined=quarantined
        )

    def validation_batches(self, share: Share, quarantined: dict[str, str]) -> Iterator[Batch]:
        clips = self._clips.model_copy(update={"clip": self.clip.unaugmented})
        return clip_evaluation_batches(clips, "val", seed=self._seed, share=share, quarantined=quarantined)

    def tokens(self, batch: Batch) -> Tensor:
        return clip_tokens(self._tokenizer, batch["clip"], self._batch_size)

    def prefixes(self, model: NextBlockConfig) -> Prefixes | None:
        return prefixes(model, _classes(self.sets)) if model.labelled else None


class PlannedLatents:
    """Latents that are not there yet: enough for what needs shapes alone."""

    def __init__(self, config: LatentConfig):
        self.grid, self.codebook_size, self._classes = config.grid, config.codebook_size, config.classes

    def tokens(self, batch: Batch) -> Tensor:
        return batch["latent"]

    def prefixes(self, model: NextBlockConfig) -> Prefixes | None:
        return planned_prefixes(model, self._classes)


def check_latent(expected: LatentConfig | None, data: PriorData, prefixes: Prefixes | None) -> None:
    """UsageError where ``data`` are not what the config has ``expected``."""
    if expected and (expected.grid, expected.codebook_size) != (tuple(data.grid), data.codebook_size):
        raise UsageError(
            f"latent: {expected.grid} of {expected.codebook_size} codes is expected, and the tokenizer makes "
            f"{tuple(data.grid)} of {data.codebook_size}"
        )
    if expected and expected.classes and prefixes and expected.classes != len(prefixes.classes):
        raise UsageError(f"latent.classes: {expected.classes} are expected, and the data have {len(prefixes.classes)}")


def _classes(sets: Mapping[str, Manifest]) -> list[str]:
    """Of all ``sets``, but for those that have none; the first is the main one."""
    main = next(iter(sets))
    classes = sets[main].classes
    if not classes:
        raise UsageError(
            f"{main}: its videos have no classes, which model.conditioning asks for; shard videos in folders of their "
            "classes, or set model.conditioning.kind to frames or none"
        )
    for where, manifest in sets.items():
        if manifest.classes and manifest.classes != classes:
            raise UsageError(
                f"{where}: its {len(manifest.classes)} classes are not the {len(classes)} of {main}, which the labels "
                "number; shard both with the same classes"
            )
    return classes


def _grid(clip: ClipConfig, export: TokenizerExport) -> tuple[int, int, int]:
    return export.model.grid(clip.frames, *clip.size)


def open_data(config: PriorDataConfig, tokenizer: TrainedTokenizer, seed: int) -> PriorData:
    """UsageError where the data are missing or do not fit the tokenizer."""
    match config:
        case CachedLatentsConfig():
            return CachedLatents(config, tokenizer, seed)
        case TokenizedClipsConfig():
            return TokenizedClips(config, tokenizer, seed)
