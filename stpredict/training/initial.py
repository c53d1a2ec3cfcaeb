"""``init_from``: a training that begins at the weights of another one, or at a part of them.

They are put into what each rank holds once the engine is built, in fp32, so that no ZeRO stage rounds them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Protocol

import yaml
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, is_checkpoint
from stpredict.training.config import InitFromConfig
from stpredict.training.pieces import Held
from stpredict.training.ranks import Ranks
from stpredict.training.restoring import CheckpointWeights, named, why_unusable_together
from stpredict.weight_files import WeightFiles, has_weights

log = logging.getLogger(__name__)
ADVISED = 8  # patterns
Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Weights and buffers of a model, by name."""

    folder: Path
    shapes: Shapes

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Sets ``out``, 1-D, to elements ``start`` and following of the flattened tensor ``name``."""


def initialise(held: Held, config: InitFromConfig, ranks: Ranks, working: Callable[[], None] = lambda: None) -> None:
    """Sets weights and buffers of what ``held`` describes from ``config``, and nothing else. On all ranks. Calls
    ``working`` while it reads.

    UsageError where the source is none, is damaged, or has not what is asked of it.
    """
    source = open_source(config, ranks, working)
    pieces = [piece for piece in held.pieces() if piece.kind in ("weight", "buffer")]
    here = {name: shape for part in ranks.gather({p.name: p.shape for p in pieces}) for name, shape in part.items()}
    taken = chosen(config, source.folder, here, source.shapes)
    for piece in pieces:
        if piece.name in taken:
            source.fill(piece.name, piece.start, piece.tensor)
            working()
    held.refresh()
    elements = {name: prod(shape) for name, shape in here.items()}
    log.info(
        "init_from %s: %s of %s parameters%s",
        source.folder,
        f"{sum(elements[name] for name in taken):,}",
        f"{sum(elements.values()):,}",
        "".join(f"; {line}" for line in named("not taken:", here.keys() - taken)),
    )


def open_source(config: InitFromConfig, ranks: Ranks, working: Callable[[], None] = lambda: None) -> Source:
    """The checkpoint or export that ``config.path`` is or, being a run, holds. UsageError where there is none."""
    path = config.path
    if is_checkpoint(path):
        if problem := why_unusable_together(path, ranks, working):
            raise UsageError(f"init_from {path}: {problem}; give another checkpoint")
        return CheckpointWeights(path, config.ema)
    for folder in (path, Run(path).export):
        if has_weights(folder):
            _refuse_other_kind(folder, config.ema)
            return WeightFiles(folder)
    if complete := complete_checkpoints(Run(path).checkpoints):
        raise UsageError(
            f"init_from {path}: this run has no export yet; finish it, or give a checkpoint: {complete[-1]}"
        )
    raise UsageError(
        f"init_from {path}: neither an export, nor a checkpoint, nor a run that has one; give another path"
    )


def _refuse_other_kind(export: Path, ema: bool | None) -> None:
    """UsageError unless the export holds averages, or weights, as ``ema`` asks for."""
    try:
        averaged = bool(yaml.safe_load((export / "config.yaml").read_text()).get("ema"))
    except (OSError, yaml.YAMLError, AttributeError):
        raise UsageError(f"init_from {export}: has no config.yaml, or a damaged one; export it again") from None
    if ema is not None and ema != averaged:
        there, asked = ("averages of the weights", "false") if averaged else ("weights, not averages", "true")
        raise UsageError(f"init_from {export}: holds {there}, and init_from.ema is {asked}; give a checkpoint instead")


def chosen(config: InitFromConfig, source: Path, here: Shapes, there: Shapes) -> set[str]:
    """The names to take. UsageError unless all that is here is there, in the same shape, and nothing else, or, of
    ``config.only``, what each pattern matches is in both."""
    names = here.keys() | there.keys()
    asked = set(names if config.only is None else ())
    for pattern in config.only or ():
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise UsageError(f"init_from.only {pattern!r} matches no parameter; there are {', '.join(_parts(names))}")
        asked |= found
    both = here.keys() & there.keys() & asked
    lines = [
        *named("it lacks", (here.keys() - there.keys()) & asked),
        *named("it has besides", (there.keys() - here.keys()) & asked),
        *named("shapes differ:", [f"{n} {there[n]} → {here[n]}" for n in both if here[n] != there[n]]),
    ]
    if lines:
        raise UsageError(
            f"init_from {source}: does not fit this model: {'; '.join(lines)}{_advice(config.path, here, there)}"
        )
    return both


def _advice(path: Path, here: Shapes, there: Shapes) -> str:
    """What of the source could be taken, as a command line says it."""
    fitting = {name for name in here if here[name] == there.get(name)}
    patterns = list(_whole(here.keys() | there.keys(), fitting))
    if not patterns:
        return "; nothing of it does"
    more = f", and {len(patterns) - ADVISED} more" if len(patterns) > ADVISED else ""
    return f"; a part of it does: init_from.path={path} 'init_from.only=[{', '.join(patterns[:ADVISED])}]'{more}"


def _whole(names: Set[str], fitting: Set[str], prefix: str = "") -> Iterator[str]:
    """Patterns, as few as there can be, of those of ``names`` that are ``fitting``."""
    for part in sorted({name.removeprefix(prefix).split(".")[0] for name in names}):
        below = {name for name in names if name.startswith(f"{prefix}{part}.")}
        if f"{prefix}{part}" in fitting:
            yield f"{prefix}{part}"
        if below and below <= fitting:
            yield f"{prefix}{part}.*"
        elif below & fitting:
            yield from _whole(below, fitting, f"{prefix}{part}.")


def _parts(names: Iterable[str]) -> list[str]:
    """Patterns of the model's parts: ``encoder.*``."""
    return sorted({f"{name.split('.')[0]}.*" if "." in name else name for name in names})
