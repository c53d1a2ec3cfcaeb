"""What a prior's latents will be, before there are any: from its config, from the tokenizer that the same pipeline
trains, or from a tokenizer that is there. Torch-free."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import ClipChanges, ClipConfig
from data_pipeline.errors import UsageError
from launcher.pipeline import Job
from stpredict.config import read_yaml, resolve, validate
from stpredict.jobs.config import EncodeConfig, PriorJobConfig, TokenizerJobConfig
from stpredict.priors.config import LatentConfig, TokenizedClipsConfig
from stpredict.run import Run
from stpredict.tokenizers.config import CausalCnnConfig


def with_latent(config: PriorJobConfig, jobs: Sequence[Job] = ()) -> PriorJobConfig:
    """``config`` with its ``latent`` filled in. UsageError where nothing says what it is."""
    if config.latent:
        return config
    tokenizer = next(
        (j.config for j in jobs if isinstance(j.config, TokenizerJobConfig) and j.config.run == config.tokenizer), None
    )
    found = (tokenizer.model, tokenizer.data.clip) if tokenizer else _trained(config.tokenizer)
    if found is None:
        raise UsageError(
            f"the prior's latents are not known: there is no tokenizer in {config.tokenizer}; give "
            "latent.grid=[5,16,16] latent.codebook_size=64000 (those of yours)"
        )
    model, clip = found
    changed = _changed(clip, _clip_changes(config, jobs))
    latent = LatentConfig(grid=model.check_clip(changed, "data.clip"), codebook_size=model.codebook_size)
    return config.model_copy(update={"latent": latent})


def _clip_changes(config: PriorJobConfig, jobs: Sequence[Job]) -> ClipChanges:
    if isinstance(config.data, TokenizedClipsConfig):
        return config.data.clip
    encoded = (j.config for j in jobs if isinstance(j.config, EncodeConfig))
    return next((e.data.clip for e in encoded if str(e.run) == str(config.data.latents)), ClipChanges())


def _changed(clip: ClipConfig, changes: ClipChanges) -> ClipConfig:
    return validate(ClipConfig, clip.model_dump() | changes.model_dump(exclude_none=True), "data.clip")


def _trained(tokenizer: Path) -> tuple[CausalCnnConfig, ClipConfig] | None:
    """Model and clip of a tokenizer's export, or of its run; None where there is none."""
    for path in (Run(tokenizer).export / "config.yaml", tokenizer / "config.yaml"):
        if path.is_file():
            written = resolve(read_yaml(path), path)
            clip = written.get("clip") or written.get("data", {}).get("clip")
            if written.get("kind") != "tokenizer" or clip is None:
                raise UsageError(f"tokenizer: {path} has kind {written.get('kind')}; a tokenizer is needed")
            return validate(CausalCnnConfig, written["model"], path), validate(ClipConfig, clip, path)
    return None
