"""Exports: one trained model without DeepSpeed, as safetensors and a config. What later jobs read.

export/config.yaml        what is needed to build the model
export/model.safetensors  fp32 weights by name
"""

import hashlib
import shutil
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_pipeline.config import ClipConfig, Config
from data_pipeline.disk import temporary_path
from data_pipeline.errors import UsageError, UserError
from stpredict.config import as_yaml, canonical_json, load, validate
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.run import Run, write_atomically
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.checkpoint import read_state
from stpredict.training.restoring import checkpoint_weights

FILES = {"config.yaml", "model.safetensors"}


class TokenizerExport(Config):
    kind: Literal["tokenizer"] = "tokenizer"
    format: Literal[1] = 1
    step: int = Field(0, description="training steps behind the weights")
    clip: ClipConfig = Field(description="the clips it was trained on")
    model: CausalCnnConfig


class PriorExport(Config):
    kind: Literal["prior"] = "prior"
    format: Literal[1] = 1
    step: int = Field(0, description="training steps behind the weights")
    codebook_size: int
    grid: tuple[int, int, int] = Field(description="token grid (T', H', W')")
    tokenizer_fingerprint: str = Field(description="of the tokenizer whose latents it models")
    model: NextBlockConfig


AnyExport = Annotated[TokenizerExport | PriorExport, Field(discriminator="kind")]


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Writes the export of a complete checkpoint to ``out``, which is absent, empty, or an older export to replace."""
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= FILES):
        raise UsageError(f"{out}: holds other things than an export; give a folder that is empty or does not exist")
    config = validate(AnyExport, read_state(checkpoint).export, checkpoint / "state.json")
    weights = dict(checkpoint_weights(checkpoint))
    temporary, old = temporary_path(out), temporary_path(out)
    try:
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / "model.safetensors")
        write_atomically(temporary / "config.yaml", as_yaml(config))
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot write the export: {error}") from error
    finally:
        if old.exists() and not out.exists():  # the swap broke off in the middle
            old.rename(out)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def find_export(path: Path) -> Path:
    """The export folder that ``path`` is or, being a run, holds. UsageError where there is none."""
    for folder in (path, Run(path).export):
        if (folder / "model.safetensors").is_file() and (folder / "config.yaml").is_file():
            return folder
    status = Run(path).status()
    if status is not None:
        raise UsageError(
            f"{path}: this run has no export yet (state: {status.state}); finish it, or `stpredict export`"
        )
    raise UsageError(f"{path}: neither a run with an export nor an export; train it first, or give another path")


def fingerprint(export: Path) -> str:
    """Hash of an export's config and weights: equal exactly when the models are."""
    config = load(AnyExport, export / "config.yaml").model_copy(update={"step": 0})
    digest = hashlib.sha256(canonical_json(config).encode())
    with (export / "model.safetensors").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(path: Path) -> tuple[CausalCnnTokenizer, TokenizerExport, str]:
    """The tokenizer of a run or an export, in evaluation mode, with its config and fingerprint."""
    folder = find_export(Path(path))
    config = load(AnyExport, folder / "config.yaml")
    if not isinstance(config, TokenizerExport):
        raise UsageError(f"{folder}: holds a {config.kind}, a tokenizer is needed here")
    return _load(CausalCnnTokenizer(config.model), folder), config, fingerprint(folder)


def load_prior(path: Path) -> tuple[NextBlockPrior, PriorExport]:
    """The prior of a run or an export, in evaluation mode, with its config."""
    folder = find_export(Path(path))
    config = load(AnyExport, folder / "config.yaml")
    if not isinstance(config, PriorExport):
        raise UsageError(f"{folder}: holds a {config.kind}, a prior is needed here")
    return _load(NextBlockPrior(config.model, config.codebook_size, config.grid), folder), config


def _load(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the weights do not fit config.yaml or are damaged: {str(error).splitlines()[0]}"
        ) from error
    return model.eval().requires_grad_(False)
