"""Published weights of the papers' authors, in their layout, as an export of ours."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.disk import temporary_path
from data_pipeline.errors import UsageError
from stpredict.config import as_yaml
from stpredict.exports import CONFIG, ForecasterExport, TokenizerExport, refuse_other_things
from stpredict.forecasters.config import AffineScaling, SimVPConfig, UnitScaling
from stpredict.forecasters.openstl import from_openstl
from stpredict.forecasters.scaling import Scaling, as_given, of_grey_levels, read_manifest_of, scaling_of
from stpredict.forecasters.simvp import SimVP
from stpredict.foreign_weights import read_weights
from stpredict.jobs.config import ForecasterJobConfig, TokenizerJobConfig
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.published import from_published
from stpredict.weight_files import WHOLE


def import_tokenizer(weights: Path, config: TokenizerJobConfig) -> Path:
    """Writes the export of ``config.run``, as if it had been trained there, and returns it.

    UsageError where the run is another's or the weights do not fit ``config.model``.
    """
    run = _unused(config.run)
    config.model.check_clip(config.data.clip, "data.clip")
    with torch.device("meta"):
        model = CausalCnnTokenizer(config.model)
    state = from_published(read_weights(weights, "import"), model, str(weights))
    return _write(run.export, TokenizerExport(clip=config.data.clip, model=config.model), state)


def import_forecaster(weights: Path, config: ForecasterJobConfig) -> Path:
    """The same of OpenSTL's SimVP. What the weights see of the values is ``data.scaling``; shards are read where that
    needs their statistics.

    UsageError also where these cannot be read.
    """
    run = _unused(config.run)
    if not isinstance(config.model, SimVPConfig):
        raise UsageError(f"model.kind {config.model.kind}: weights of simvp are imported; give such a model")
    with torch.device("meta"):
        model = SimVP(config.model)
    state = from_openstl(read_weights(weights, "import"), model, str(weights))
    scaling = _scaling(config)
    export = ForecasterExport(
        clip=config.data.clips(config.model).clip,
        model=config.model,
        scaling=config.data.scaling,
        channels=list(scaling.channels),
        units=list(scaling.units),
        offset=scaling.offset,
        scale=scaling.scale,
    )
    return _write(run.export, export, state)


def _scaling(config: ForecasterJobConfig) -> Scaling:
    data, channels = config.data, config.model.channels
    match data.scaling:
        case UnitScaling():
            return of_grey_levels(channels)
        case AffineScaling() as affine:
            return as_given(affine, channels)
    try:
        manifest = read_manifest_of(data.shards, "train", data.made_with)
    except UsageError as error:
        raise UsageError(
            f"{error}; or say what the weights see: data.scaling={{kind: unit}} for frames in [0, 1], {{kind: affine, "
            "offset: ..., scale: ...}} with those of their training for fields"
        ) from None
    return scaling_of(data.scaling, channels, f"{data.shards}/train", manifest)


def _unused(path: Path) -> Run:
    run = Run(path)
    if run.status() is not None:
        raise UsageError(f"{path}: holds a run; give the imported weights a place of their own, run=...")
    refuse_other_things(run.export)
    return run


def _write(out: Path, config: TokenizerExport | ForecasterExport, state: dict[str, Tensor]) -> Path:
    temporary = temporary_path(out)
    try:
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / WHOLE)
        (temporary / CONFIG).write_text(as_yaml(config))
        (temporary / WHOLE).chmod((temporary / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
