"""A study's grid: its axes, their labels and changes, and the trials, which are its points. Every mistake in it is one
line that names the file and the axis."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import UsageError
from launcher.config import Axis, PipelineJob, StudyConfig
from stpredict.config import flat

LABEL = re.compile(r"[\w-]+")


class Trial(NamedTuple):
    name: str
    at: dict[str, str]  # axis → label
    changes: list[dict[str, Any]]  # of ``trial``, in the order of the axes


class Value(NamedTuple):
    """One value of an axis: what it is called, and what of ``trial`` it changes."""

    label: str
    change: dict[str, Any]


def trials_of(study: StudyConfig, path: Path) -> list[Trial]:
    """Every point of the grid but those left out, the last axis fastest. UsageError names axis and what to do."""
    axes = {name: values_of(axis, name, study, path) for name, axis in study.grid.items()}
    _refuse_overlaps(axes, path)
    left_out = _left_out(study, axes, path)
    trials: dict[str, Trial] = {}
    for values in product(*axes.values()):
        at = {axis: value.label for axis, value in zip(axes, values, strict=True)}
        if any(point.items() <= at.items() for point in left_out):
            continue
        name = "-".join(at.values())
        if other := trials.get(name):
            points = " and ".join(str(trial) for trial in (other.at, at))
            raise UsageError(f"{path}: grid: two trials are called {name}: {points}; give other labels")
        if name in (*study.jobs, *study.trial, "report", "launcher"):
            raise UsageError(f"{path}: grid: a trial is called {name}, like a job; give its value a label of its own")
        trials[name] = Trial(name, at, [value.change for value in values])
    if not trials:
        raise UsageError(f"{path}: without: leaves nothing of the grid")
    return list(trials.values())


def shape(study: StudyConfig, trials: int) -> str:
    """``5 size x 2 seed = 10 trials``, and how many of them are left out."""
    sizes = {name: len(axis.values) for name, axis in study.grid.items()}
    whole = 1
    for size in sizes.values():
        whole *= size
    less = f" - {whole - trials} left out" if whole != trials else ""
    return f"{' x '.join(f'{size} {name}' for name, size in sizes.items())}{less} = {trials} trial{'s' * (trials != 1)}"


def labels_of(axis: Axis, name: str) -> list[str]:
    """What the values of an axis are called."""
    return list(axis.values) if isinstance(axis.values, dict) else [label_of(name, value) for value in axis.values]


def values_of(axis: Axis, name: str, study: StudyConfig, path: Path) -> list[Value]:
    """The values of an axis, each with its label. UsageError where two are equal, or one changes what is not there."""
    where = f"{path}: grid.{name}"
    if not axis.values:
        raise UsageError(f"{where}.values is empty; give it a value, or remove the axis")
    if axis.key:
        _check_key(axis.key, study.trial, f"{where}.key: {axis.key}")
    elif isinstance(axis.values, list):
        raise UsageError(
            f"{where}: what do its values change? Give `key`, such as {next(iter(study.trial))}.set.seed, or label → "
            "changes of `trial`"
        )
    named = axis.values if isinstance(axis.values, dict) else _labelled(axis.values, name, where)
    seen: dict[str, str] = {}
    found = []
    for label, value in named.items():
        if not LABEL.fullmatch(label):
            raise UsageError(
                f"{where}.values: {label!r} is no label: letters, digits, _ and -, since folders are called so"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where}.values: {value} is no finite number")
        first = seen.setdefault(_canonical(value), label)
        if first != label:
            raise UsageError(f"{where}.values: {first!r} and {label!r} are the same value; remove one")
        if not axis.key:
            _check_changes(value, study.trial, f"{where}.values.{label}")
        found.append(Value(label, _nested(axis.key, value) if axis.key else value))
    return found


def label_of(axis: str, value: Any) -> str:
    """What a value of an axis without labels is called: seed0, lr3e-3, block1x1x8."""
    if isinstance(value, list):
        text = "x".join(map(str, value))
    elif isinstance(value, float) and math.isfinite(value):
        digits, exponent = f"{value:e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = str(value)
    return axis + re.sub(r"[^\w-]+", "_", text)


def _labelled(values: Sequence[Any], name: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in values:
        label = label_of(name, value)
        if label in found:
            if _canonical(value) == _canonical(found[label]):
                raise UsageError(f"{where}.values: {value} is there twice; remove one")
            raise UsageError(
                f"{where}.values: {found[label]} and {value} are both called {label}; give labels: {{LABEL: VALUE}}"
            )
        found[label] = value
    return found


def _canonical(value: Any) -> str:
    """The same text for values that are the same: 1e-3 and 0.001, 1 and 1.0."""
    if isinstance(value, dict):
        return repr(sorted((key, _canonical(inner)) for key, inner in flat(value).items())) if value else "{}"
    if isinstance(value, list):
        return repr([_canonical(inner) for inner in value])
    return repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _check_key(key: str, trial: dict[str, PipelineJob], where: str) -> None:
    job, _, rest = key.partition(".")
    if job not in trial:
        near = difflib.get_close_matches(job, trial, n=1)
        hint = f"did you mean {near[0]}.{rest}?" if near else f"its jobs: {', '.join(trial)} (JOB.set.KEY)"
        raise UsageError(f"{where}: `trial` has no job {job!r}; {hint}")
    if rest.partition(".")[0] not in PipelineJob.model_fields or rest == "set":
        raise UsageError(f"{where}: did you mean {job}.set.{rest if rest not in ('', 'set') else 'KEY'}?")


def _check_changes(change: Any, trial: dict[str, PipelineJob], where: str) -> None:
    if not isinstance(change, dict) or not change:
        raise UsageError(f"{where}: give changes of `trial`, such as {{{next(iter(trial))}: {{set: {{seed: 1}}}}}}")
    for job, changes in change.items():
        _check_key(f"{job}.set.KEY", trial, f"{where}.{job}")
        if not isinstance(changes, dict):
            raise UsageError(f"{where}.{job}: give changes of that job, such as {{set: {{seed: 1}}}}")
        for key in changes:
            if key not in PipelineJob.model_fields:
                raise UsageError(f"{where}.{job}.{key}: did you mean {job}: {{set: {{{key}: ...}}}}?")


def _refuse_overlaps(axes: dict[str, list[Value]], path: Path) -> None:
    """UsageError where two axes change the same key: of one of them nothing would be left."""
    keys = {name: {key for value in values for key in flat(value.change)} for name, values in axes.items()}
    for (one, its), (other, others) in combinations(keys.items(), 2):
        if both := next(_overlaps(its, others), None):
            raise UsageError(f"{path}: grid.{one} and grid.{other} both change {both}; of one nothing would be left")


def _overlaps(keys: set[str], others: set[str]) -> Iterator[str]:
    for key in sorted(keys):
        for other in sorted(others):
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                yield max(key, other, key=len)


def _left_out(study: StudyConfig, axes: dict[str, list[Value]], path: Path) -> tuple[dict[str, str], ...]:
    for number, point in enumerate(study.without):
        where = f"{path}: without.{number}"
        if not point:
            raise UsageError(f"{where} is empty: give axis: label, or remove it")
        for axis, label in point.items():
            if axis not in axes:
                raise UsageError(f"{where}: the grid has no axis {axis!r}; its axes: {', '.join(axes)}")
            labels = [value.label for value in axes[axis]]
            if label not in labels:
                raise UsageError(f"{where}: grid.{axis} has no value called {label!r}; there: {', '.join(labels)}")
    return study.without


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
