"""Published weights of the papers' authors, in their layout, as an export of ours."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_pipeline.disk import temporary_path
from data_pipeline.errors import UsageError
from stpredict.config import as_yaml
from stpredict.exports import CONFIG, TokenizerExport, refuse_other_things
from stpredict.foreign_weights import read_weights
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.published import from_published
from stpredict.weight_files import WHOLE


def import_tokenizer(weights: Path, config: TokenizerJobConfig) -> Path:
    """Writes the export of ``config.run``, as if it had been trained there, and returns it.

    UsageError where the run is another's or the weights do not fit ``config.model``.
    """
    run = Run(config.run)
    if run.status() is not None:
        raise UsageError(f"{config.run}: holds a run; give the imported weights a place of their own, run=...")
    refuse_other_things(run.export)
    config.model.check_clip(config.data.clip, "data.clip")
    with torch.device("meta"):
        model = CausalCnnTokenizer(config.model)
    state = from_published(read_weights(weights, "import"), model, str(weights))
    temporary = temporary_path(run.export)
    try:
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / WHOLE)
        (temporary / CONFIG).write_text(as_yaml(TokenizerExport(clip=config.data.clip, model=config.model)))
        (temporary / WHOLE).chmod((temporary / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        if run.export.exists():
            shutil.rmtree(run.export)
        temporary.rename(run.export)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run.export
