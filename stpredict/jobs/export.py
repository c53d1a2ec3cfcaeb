"""Exports a trained model from any sound checkpoint, in one process and without starting DeepSpeed."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from data_pipeline.errors import UsageError, UserError
from stpredict.config import validate
from stpredict.exports import AnyExport, PriorExport, export_checkpoint, load_prior, refuse_other_things
from stpredict.priors.llama import refuse_others, write_llama
from stpredict.run import Run
from stpredict.training.checkpoint import (
    all_checkpoints,
    best_checkpoint,
    complete_checkpoints,
    folder_of,
    is_checkpoint,
    read_marker,
    read_state,
    step_of,
    why_unusable,
)
from stpredict.training.config import BestConfig

log = logging.getLogger(__name__)
#: Shows a description and what is done of so many bytes.
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def export_run(path: Path, out: Path, bar: Bar, step: int | None, best: bool, ema: bool | None) -> None:
    """Writes the export of a checkpoint to ``out``. ``path`` is that checkpoint, or a run: then it is the one of
    ``step``, the ``best``, or the newest sound one. UserError where a checkpoint that was asked for is damaged."""
    refuse_other_things(out)  # before a checkpoint is read, which may take minutes
    checkpoint = _find(path, bar, step, best)
    with bar(f"exporting {checkpoint.name}") as progress:
        export_checkpoint(checkpoint, out, ema, progress=progress)


def export_llama(path: Path, out: Path, bar: Bar, step: int | None, best: bool, ema: bool | None) -> None:
    """As ``export_run``, of a prior that is a LLaMA and in the layout of transformers. The model is in memory once."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; give a folder that is empty or does not exist")
    checkpoint = _find(path, bar, step, best)
    config = validate(AnyExport, read_state(checkpoint).export, checkpoint / "state.json")
    if not isinstance(config, PriorExport):
        raise UsageError(f"--format hf-llama: {path} is a {config.kind}'s; a prior is needed")
    refuse_others(config.model)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        exported, written = Path(folder) / "export", Path(folder) / "llama"
        with bar(f"exporting {checkpoint.name}") as progress:
            export_checkpoint(checkpoint, exported, ema, progress=progress)
        write_llama(load_prior(exported)[0], written)
        written.rename(out)  # at once: no half of it is ever there


def _find(path: Path, bar: Bar, step: int | None, best: bool) -> Path:
    """The checkpoint to export; all of it has been read and is sound."""
    if step is not None and best:
        raise UsageError("give --step or --best, not both")
    if is_checkpoint(path):
        if step is not None or best:
            raise UsageError(f"{path}: is a checkpoint; --step and --best go with a run")
        wanted = path
    elif step is not None:
        wanted = _of_step(path, step)
    elif best:
        wanted = _best(path)
    else:
        return _newest_sound(path, bar)
    if problem := _problem(wanted, bar):
        raise UserError(f"{wanted} {problem}; export another checkpoint")
    return wanted


def _problem(checkpoint: Path, bar: Bar) -> str | None:
    if isinstance(problem := read_marker(checkpoint), str):
        return problem
    with bar(f"verifying {checkpoint.name}") as progress:
        return why_unusable(checkpoint, progress)


def _newest_sound(path: Path, bar: Bar) -> Path:
    problems = {}
    for folder in reversed(all_checkpoints(Run(path).checkpoints)):
        if (problem := _problem(folder, bar)) is None:
            for other, why in problems.items():
                log.warning("%s %s: skipped", other, why)
            return folder
        problems[folder] = problem
    if problems:
        raise UserError("; ".join(f"{folder} {problem}" for folder, problem in problems.items()))
    raise _no_run(path)


def _no_run(path: Path) -> UsageError:
    return UsageError(f"{path}: no run with a complete checkpoint here")


def _of_step(path: Path, step: int) -> Path:
    folder = folder_of(Run(path).checkpoints, step)
    if folder.is_dir():
        return folder
    there = ", ".join(str(step_of(other)) for other in complete_checkpoints(folder.parent))
    if not there:
        raise _no_run(path)
    raise UsageError(f"{path}: no complete checkpoint of step {step}; there are {there}")


def _best(path: Path) -> Path:
    """The complete checkpoint that was best by the run's training.checkpoint.best; of equal ones, the latest."""
    run = Run(path)
    try:
        config = yaml.safe_load(run.config_path.read_text())
        best = BestConfig.model_validate(config["training"]["checkpoint"]["best"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: --best needs a run that was trained with training.checkpoint.best") from None
    found = best_checkpoint(run.checkpoints, best.metric, best.mode)
    if found is None:
        raise UsageError(f"{path}: no complete checkpoint here was saved with a validation's {best.metric}")
    return found
