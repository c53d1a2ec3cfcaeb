"""Exports a trained model from any complete checkpoint of a run, in one process and without starting DeepSpeed."""

from pathlib import Path

from data_pipeline.errors import UsageError
from stpredict.exports import export_checkpoint
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints


def export_run(path: Path, out: Path, step: int | None = None) -> Path:
    """Writes the export of checkpoint ``step`` (default: the newest complete one) to ``out``."""
    complete = {
        int(folder.name.removeprefix("step_")): folder for folder in complete_checkpoints(Run(path).checkpoints)
    }
    if not complete:
        raise UsageError(f"{path}: no run with a complete checkpoint here")
    if step is not None and step not in complete:
        raise UsageError(f"{path}: no complete checkpoint of step {step}; there are {', '.join(map(str, complete))}")
    export_checkpoint(complete[max(complete) if step is None else step], out)
    return out
