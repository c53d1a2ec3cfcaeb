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

    def mean(self, values: Sequence[float | None]) -> tuple[float | None, float | None, int]:
        """Mean, standard deviation and number of those that are known."""
        known = [value for value in values if value is not None]
        return (
            mean(known) if known else None,
            stdev(known) if len(known) > 1 else None,
            len(known),
        )


def chosen_of(analysis: Analysis) -> dict[str, bool]:
    """Trial → whether its learning rate is the best of its size's, for those that the analysis used."""
    return {used.trial: used.best_lr for group in analysis.groups for used in group.used}


def cells_of(axis: str, trials: Sequence[TrialPoints], look: Look, best: Mapping[str, bool]) -> list[Cell]:
    """Those with trials that are done and did not diverge, at their best learning rate."""
    there = [trial for trial in trials if trial.done and not trial.diverged and best.get(trial.name, True)]
    labels = in_order([trial.at[axis] for trial in trials], axis)
    cells = [
        Cell(label, colour, [t for t in there if t.at[axis] == label and t.at[look.axis] == colour])
        for label in labels
        for colour in look.labels
    ]
    return [cell for cell in cells if cell.trials]


def to_compare(axes: Mapping[str, Role], trials: Sequence[TrialPoints]) -> list[str]:
    """Axes whose values are there to be compared, and are several."""
    return [axis for axis, role in axes.items() if role in ("other", "data") and len({t.at[axis] for t in trials}) > 1]
