"""Every cell of a study's grid by itself: the trials at one value of each axis, which differ in their seed alone.
Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stpredict.studies.compare import spread
from stpredict.studies.config import Role
from stpredict.studies.look import Look
from stpredict.studies.measures import MEASURES, METHODS, measured, yardstick
from stpredict.studies.places import in_order
from stpredict.studies.points import TrialPoints


@dataclass(frozen=True)
class Place:
    """``at`` each axis but the seed; ``planned``: all of its trials; ``trials``: those that are done and did not
    diverge."""

    at: Mapping[str, str]
    planned: int
    trials: Sequence[TrialPoints]

    @property
    def evaluated(self) -> int:
        return sum(bool(trial.forecast or trial.evaluation) for trial in self.trials)


def places_of(trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look) -> list[Place]:
    """In the order of the axes, and of their values."""
    others = [axis for axis, role in axes.items() if role != "seed"]
    order = {axis: in_order([trial.at[axis] for trial in trials], axis) for axis in others} | {look.axis: look.labels}
    found: dict[tuple[str, ...], list[TrialPoints]] = {}
    for trial in trials:
        found.setdefault(tuple(trial.at[axis] for axis in others), []).append(trial)
    ordered = sorted(found, key=lambda at: [order[axis].index(label) for axis, label in zip(others, at, strict=True)])
    return [
        Place(dict(zip(others, at, strict=True)), len(found[at]), [t for t in found[at] if t.done and not t.diverged])
        for at in ordered
    ]


def crossed(trials: Sequence[TrialPoints], axes: Mapping[str, Role]) -> list[str]:
    """The axes of several values but the seed."""
    return [axis for axis, role in axes.items() if role != "seed" and len({trial.at[axis] for trial in trials}) > 1]


@dataclass(frozen=True)
class CellRow:
    """``labels`` of each axis, or a yardstick's name alone; ``values``: mean and standard deviation."""

    labels: Sequence[str]
    trials: str
    values: Sequence[tuple[float | None, float | None]]


@dataclass(frozen=True)
class CellTable:
    axes: Sequence[str]
    titles: Sequence[str]
    rows: Sequence[CellRow]
    yardsticks: Sequence[CellRow]


def cell_table(places: Sequence[Place], axes: Sequence[str]) -> CellTable | None:
    """A row for each place, by ``axes``, those that are ``crossed``; None where these are not two or more
    (with one, a cell is one of its values), or nothing is done."""
    trials = [trial for place in places for trial in place.trials]
    measures = measured(trials)
    if len(axes) < 2 or not measures:
        return None
    some_evaluated = any(place.evaluated for place in places)
    rows = [
        CellRow(
            [place.at[axis] for axis in axes],
            _trials(place, some_evaluated),
            [spread([MEASURES[name](trial) for trial in place.trials]) for name in measures],
        )
        for place in places
    ]
    yardsticks = [CellRow([method], str(n), values) for method, n, values in yardsticks_of(trials, list(measures))]
    return CellTable(axes, list(measures.values()), rows, yardsticks)


def yardsticks_of(
    trials: Sequence[TrialPoints], measures: Sequence[str]
) -> list[tuple[str, int, list[tuple[float | None, float | None]]]]:
    """(method, trials that were measured beside it, mean and standard deviation of each measure)."""
    found = []
    for method in METHODS:
        values = [[yardstick(trial, name, method) for name in measures] for trial in trials]
        there = [row for row in values if any(value is not None for value in row)]
        if there:
            found.append((method, len(there), [spread(column) for column in zip(*there, strict=True)]))
    return found


def _trials(place: Place, some_evaluated: bool) -> str:
    """2, or: 2 of 3, 1 evaluated."""
    done = len(place.trials)
    said = str(done) if done == place.planned else f"{done} of {place.planned}"
    return f"{said}, {place.evaluated} evaluated" if some_evaluated and place.evaluated < done else said
