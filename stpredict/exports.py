"""Exports: one trained model without DeepSpeed, as safetensors and a config. What later jobs read.

export/config.yaml        what is needed to build the model
export/model.safetensors  fp32 weights by name, or several files and an index (stpredict/weight_files.py)
"""

import glob
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.config import ClipConfig, Config
from data_pipeline.disk import temporary_path
from data_pipeline.errors import UsageError, UserError
from stpredict.config import as_yaml, canonical_json, load, validate
from stpredict.forecasters.build import build_forecaster
from stpredict.forecasters.config import AnyForecaster, AnyScaling
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.run import Run, write_atomically
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.checkpoint import flush, read_state
from stpredict.training.restoring import CheckpointWeights
from stpredict.weight_files import INDEX, MAX_FILE_BYTES, WeightFiles, has_weights, index_text, is_weight_file, split

CONFIG = "config.yaml"


class TokenizerExport(Config):
    kind: Literal["tokenizer"] = "tokenizer"
    format: Literal[1] = 1
    step: int = Field(0, description="training steps behind the weights")
    ema: bool = Field(False, description="they are averages over the training (training.ema_decay)")
    clip: ClipConfig = Field(description="the clips it was trained on")
    model: CausalCnnConfig


class PriorExport(Config):
    kind: Literal["prior"] = "prior"
    format: Literal[1] = 1
    step: int = Field(0, description="training steps behind the weights")
    ema: bool = Field(False, description="they are averages over the training (training.ema_decay)")
    codebook_size: int
    grid: tuple[int, int, int] = Field(description="token grid (T', H', W')")
    tokenizer_fingerprint: str = Field(description="of the tokenizer whose latents it models")
    classes: list[str] = Field([], description="names, in the order of their numbers, where it is told the class")
    text_tokenizer: str | None = Field(None, description="sha256 of model.conditioning.tokenizer, where there is one")
    model: NextBlockConfig


class ForecasterExport(Config):
    kind: Literal["forecaster"] = "forecaster"
    format: Literal[1] = 1
    step: int = Field(0, description="training steps behind the weights")
    ema: bool = Field(False, description="they are averages over the training (training.ema_decay)")
    clip: ClipConfig = Field(description="the clips it was trained on")
    model: AnyForecaster
    scaling: AnyScaling | None = Field(None, description="as configured")
    channels: list[str] = Field([], description="names, where the training data have such")
    units: list[str] = Field([], description="of the channels")
    offset: tuple[float, ...] = Field(description="of each channel: (x - offset) / scale is what the model sees")
    scale: tuple[float, ...]


AnyExport = Annotated[TokenizerExport | PriorExport | ForecasterExport, Field(discriminator="kind")]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    ema: bool | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the export of a complete checkpoint to ``out``, which is absent, empty, or an older export to replace.

    The averages of the weights where the training kept such, unless ``ema`` says otherwise. Holds the tensors of one
    file in memory. ``progress`` is told the bytes that are read, and all. UsageError where ``out`` holds other things
    or there are no averages; UserError where there is no room.
    """
    refuse_other_things(out)
    config = validate(AnyExport, read_state(checkpoint).export, checkpoint / "state.json")
    weights = CheckpointWeights(checkpoint, ema)
    config = config.model_copy(update={"ema": weights.ema})
    temporary, old = temporary_path(out), temporary_path(out)
    if out.exists():  # else the only export may be among them: one was killed in the middle of the swap
        _remove_leftovers(out)
    try:
        temporary.mkdir(parents=True)
        needed, free = sum(weights.sizes.values()), shutil.disk_usage(temporary).free
        if needed > free:
            raise UserError(
                f"{out}: the export needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room, or give "
                "another place"
            )
        _write_weights(weights, temporary, max_file_bytes, progress)
        write_atomically(temporary / CONFIG, as_yaml(config))
        for path in temporary.iterdir():
            path.chmod((temporary / CONFIG).stat().st_mode)  # safetensors lets nobody else read what it writes
            flush(path)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        _remove_leftovers(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot write the export: {error}") from error
    finally:
        if old.exists() and not out.exists():  # the swap broke off in the middle
            old.rename(out)
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_other_things(out: Path) -> None:
    """UsageError unless ``out`` is absent, empty, or an older export to replace."""
    if out.exists() and not (out.is_dir() and all(_is_ours(path.name) for path in out.iterdir())):
        raise UsageError(f"{out}: holds other things than an export; give a folder that is empty or does not exist")


def _remove_leftovers(out: Path) -> None:
    """The export that was replaced, and those that were killed before they were whole."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(name: str) -> bool:
    return name == CONFIG or is_weight_file(name)


def _write_weights(
    weights: CheckpointWeights, folder: Path, max_file_bytes: int, progress: Callable[[int, int], None]
) -> None:
    sizes = weights.sizes
    files = split(sizes, max_file_bytes)
    done, total = 0, sum(sizes.values())
    # One piece of memory for all files: what is allocated for each tensor anew need not be given back in between.
    memory = torch.empty(max(sum(map(_aligned, map(sizes.get, names))) for names in files.values()), dtype=torch.uint8)
    for file, names in files.items():
        tensors, start = {}, 0
        for name in names:
            tensor = memory[start : start + sizes[name]].view(weights.types[name])
            weights.fill(name, 0, tensor)
            tensors[name] = tensor.view(weights.shapes[name])
            start += _aligned(sizes[name])
            done += sizes[name]
            progress(done, total)
        save_file(tensors, folder / file)
    if len(files) > 1:
        write_atomically(folder / INDEX, index_text(files, sizes))


def _aligned(size: int) -> int:
    """``size`` rounded up to where a tensor of any type may begin."""
    return -(-size // 8) * 8


def find_export(path: Path) -> Path:
    """The export folder that ``path`` is or, being a run, holds. UsageError where there is none."""
    for folder in (path, Run(path).export):
        if has_weights(folder) and (folder / CONFIG).is_file():
            return folder
    status = Run(path).status()
    if status is not None and status.kind not in ("tokenizer", "prior", "forecaster"):
        raise UsageError(f"{path}: a run of kind {status.kind} makes no model; give that of a training, or an export")
    if status is not None:
        raise UsageError(
            f"{path}: this run has no export yet (state: {status.state}); finish it, or `stpredict export`"
        )
    raise UsageError(f"{path}: neither a run with an export nor an export; train it first, or give another path")


def fingerprint(export: Path) -> str:
    """Hash of an export's config and weights: equal exactly when the models are, whatever they were trained like."""
    config = load(AnyExport, export / CONFIG).model_copy(update={"step": 0})
    # Exports that are older than `ema` keep their fingerprint, by which latents know their tokenizer.
    digest = hashlib.sha256(canonical_json(config, but={"ema"}).encode())
    for path in WeightFiles(export).paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(path: Path) -> tuple[CausalCnnTokenizer, TokenizerExport, str]:
    """The tokenizer of a run or an export, in evaluation mode, with its config and fingerprint."""
    folder = find_export(Path(path))
    config = load(AnyExport, folder / CONFIG)
    if not isinstance(config, TokenizerExport):
        raise UsageError(f"{folder}: holds a {config.kind}, a tokenizer is needed here")
    return _load(CausalCnnTokenizer(config.model), folder), config, fingerprint(folder)


def load_prior(path: Path) -> tuple[NextBlockPrior, PriorExport]:
    """The prior of a run or an export, in evaluation mode, with its config."""
    folder = find_export(Path(path))
    config = load(AnyExport, folder / CONFIG)
    if not isinstance(config, PriorExport):
        raise UsageError(f"{folder}: holds a {config.kind}, a prior is needed here")
    return _load(NextBlockPrior(config.model, config.codebook_size, config.grid, len(config.classes)), folder), config


def load_forecaster(path: Path) -> tuple[torch.nn.Module, ForecasterExport]:
    """The forecaster of a run or an export, in evaluation mode, with its config."""
    folder = find_export(Path(path))
    config = load(AnyExport, folder / CONFIG)
    if not isinstance(config, ForecasterExport):
        raise UsageError(f"{folder}: holds a {config.kind}, a forecaster is needed here")
    return _load(build_forecaster(config.model), folder), config


@torch.no_grad()
def _load(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Sets ``model`` tensor by tensor, so that the weights are in memory once. UserError where they do not fit."""
    weights, tied = WeightFiles(folder), model.state_dict()
    named = dict([*model.named_parameters(), *model.named_buffers()])  # a weight under several names has one there
    state = {name: tensor for name, tensor in tied.items() if name in named}
    wrong = [name for name in weights.shapes if name not in state]
    wrong += [name for name, tensor in state.items() if weights.shapes.get(name) != tensor.shape]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit config.yaml: {min(wrong)} is missing or of another shape")
    for name, tensor in state.items():
        weights.fill(name, 0, tensor.view(-1))
    return model.eval().requires_grad_(False)
