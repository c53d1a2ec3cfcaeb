"""What the other axes of a study compare: its trials by one axis' value and one colour, at their best learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from stpredict.studies.analysis import Analysis
from stpredict.studies.config import Role
from stpredict.studies.look import Look
from stpredict.studies.places import in_order
from stpredict.studies.points import TrialPoints


@dataclass(frozen=True)
class Cell:
    """The trials at ``label`` of the axis, that have the colour of ``colour``."""

    label: str
    colour: str
    trials: Sequence[TrialPoints]


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of those that are known."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None, stdev(known) if len(known) > 1 else None


def chosen_of(analysis: Analysis) -> dict[str, bool]:
    """Trial → whether its learning rate is the best of its size's, for those that the analysis used."""
    return {used.trial: used.best_lr for group in analysis.groups for used in group.used}


@dataclass(frozen=True)
class Comparison:
    """The cells of an axis, and the names of the trials that have nothing to be compared with."""

    cells: Sequence[Cell]
    left_out: Sequence[str]

    @property
    def over(self) -> list[str]:
        """The axes in which the trials of one cell differ: what its means are taken over."""
        trials = [trial for cell in self.cells for trial in cell.trials]
        axes = trials[0].at if trials else ()
        return [axis for axis in axes if any(len({t.at[axis] for t in cell.trials}) > 1 for cell in self.cells)]


def comparison_of(
    axis: str, trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look, best: Mapping[str, bool]
) -> Comparison:
    """Of trials that are done and did not diverge, at their best learning rate; of each colour those where all its
    values have one."""
    there = [trial for trial in trials if trial.done and not trial.diverged and best.get(trial.name, True)]
    colours = {} if axis == look.axis else dict.fromkeys(look.labels)
    groups = [[trial for trial in there if trial.at[look.axis] == colour] for colour in colours] or [there]
    alike = [trial for group in groups for trial in at_places_of_all(group, axes, axis)]
    cells = [
        Cell(label, colour, [t for t in alike if t.at[axis] == label and t.at[look.axis] == colour])
        for label in in_order([trial.at[axis] for trial in trials], axis)
        for colour in look.labels
    ]
    compared = {trial.name for trial in alike}
    return Comparison([cell for cell in cells if cell.trials], [t.name for t in there if t.name not in compared])


def at_places_of_all(trials: Sequence[TrialPoints], axes: Mapping[str, Role], axis: str) -> list[TrialPoints]:
    """Those at places of the other axes where every value of ``axis`` has a trial: means over other places differ by
    these. Seeds are repetitions, and each has its own best learning rate."""
    others = [other for other, role in axes.items() if role not in ("seed", "lr") and other != axis]
    values: dict[tuple[str, ...], set[str]] = {}
    for trial in trials:
        values.setdefault(tuple(trial.at[other] for other in others), set()).add(trial.at[axis])
    every = {trial.at[axis] for trial in trials}
    return [trial for trial in trials if values[tuple(trial.at[other] for other in others)] == every]


def to_compare(axes: Mapping[str, Role], trials: Sequence[TrialPoints]) -> list[str]:
    """Axes whose values are there to be compared, and are several."""
    return [axis for axis, role in axes.items() if role in ("other", "data") and len({t.at[axis] for t in trials}) > 1]
