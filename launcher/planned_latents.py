"""What a prior's latents will be, before there are any: from its config, from the tokenizer that the same pipeline
trains, or from a tokenizer that is there. Torch-free."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import ClipChanges, ClipConfig
from data_pipeline.errors import UsageError
from launcher.pipeline import Job
from stpredict.config import read_yaml, resolve, validate
from stpredict.jobs.config import EncodeConfig, JobConfig, PriorJobConfig, TokenizerJobConfig
from stpredict.priors.config import LatentConfig, TokenizedClipsConfig
from stpredict.run import Run
from stpredict.tokenizers.config import CausalCnnConfig

OPEN = "(open)"  # stands for a value that a config leaves open (???): an estimate needs no data


def with_latent(config: PriorJobConfig, jobs: Sequence[Job] = ()) -> PriorJobConfig:
    """``config`` with its ``latent`` filled in. UsageError where nothing says what it is."""
    if config.latent:
        return config
    found = _tokenizer(config, jobs)
    if found is None:
        where = "" if str(config.tokenizer) == OPEN else f" in {config.tokenizer}"
        raise UsageError(
            f"the prior's latents are not known: there is no tokenizer{where}; give tokenizer=RUN, or "
            "latent.grid=[5,16,16] latent.codebook_size=64000 (those of yours)"
        )
    model, clip = found
    latent = LatentConfig(grid=model.check_clip(clip, "data.clip"), codebook_size=model.codebook_size)
    return config.model_copy(update={"latent": latent})


def tokenizer_in_steps(config: JobConfig, jobs: Sequence[Job] = ()) -> tuple[CausalCnnConfig, ClipConfig] | None:
    """What a prior runs in every step, and on which clips: None where it reads tokens that were cached, where the job
    is no prior, and where there is no such tokenizer."""
    if not isinstance(config, PriorJobConfig) or not isinstance(config.data, TokenizedClipsConfig):
        return None
    found = _tokenizer(config, jobs)
    if found is None:
        return None
    model, clip = found
    grid = model.check_clip(clip, "data.clip")
    if config.latent and (config.latent.grid, config.latent.codebook_size) != (grid, model.codebook_size):
        raise UsageError(
            f"latent: {config.latent.grid} of {config.latent.codebook_size} codes, and the tokenizer in "
            f"{config.tokenizer} makes {grid} of {model.codebook_size}"
        )
    return found


def _tokenizer(config: PriorJobConfig, jobs: Sequence[Job]) -> tuple[CausalCnnConfig, ClipConfig] | None:
    """The prior's tokenizer, and the clips that it sees for it."""
    of_pipeline = next(
        (j.config for j in jobs if isinstance(j.config, TokenizerJobConfig) and j.config.run == config.tokenizer), None
    )
    found = (of_pipeline.model, of_pipeline.data.clip) if of_pipeline else _trained(config.tokenizer)
    return found and (found[0], _changed(found[1], _clip_changes(config, jobs)))


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
