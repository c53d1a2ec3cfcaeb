"""How the charts of a study look: a colour for each size, axes whose ticks can be read, what is labelled how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stpredict.evaluation.units import count, power
from stpredict.studies.config import Role
from stpredict.studies.places import in_order
from stpredict.studies.points import TrialPoints

# From the smallest to the largest. Of middling lightness throughout, to be seen on white and on black.
SIZES = LinearSegmentedColormap.from_list("sizes", ["#3a76e0", "#8b62d6", "#cf4f9b", "#ec6a4c", "#eda52f"])
LAW = "#3b82f6"
GREY = "#8b949e"  # what diverged, and what is beside the point
WIDTH = 1.75  # inches of a column of a legend
COUNT, FLOPS, PLAIN = count, power, lambda value: f"{value:.4g}"


@dataclass(frozen=True)
class Look:
    """What tells trials apart: ``axis``, by colour; ``labels`` in order; ``names``: what the legend calls them."""

    axis: str
    labels: Sequence[str]
    colours: Mapping[str, str]
    names: Mapping[str, str]

    def of(self, trial: TrialPoints) -> str:
        return self.colours[trial.at[self.axis]]

    def legend(self, figure: Figure, more: Sequence[Line2D] = ()) -> None:
        """Below the charts, in order."""
        lines = [Line2D([], [], color=self.colours[label], label=self.names[label]) for label in self.labels]
        lines = [*lines, *more]
        columns = min(len(lines), int(figure.get_figwidth() / WIDTH))
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=8)


def look_of(trials: Sequence[TrialPoints], axes: Mapping[str, Role]) -> Look:
    """Colours are sizes, where the study has several; otherwise the first axis that has several values."""
    values = {axis: list(dict.fromkeys(trial.at[axis] for trial in trials)) for axis in axes}
    several = [axis for axis in axes if len(values[axis]) > 1] or list(axes)
    ranks: list[Role] = ["size", "other", "data", "lr", "seed"]
    axis = min(several, key=lambda axis: ranks.index(axes[axis]))
    parameters = {label: _parameters(trials, axis, label) for label in values[axis]}
    labels = in_order(values[axis], axis)
    if axes[axis] == "size" and all(parameters.values()):
        labels.sort(key=parameters.__getitem__)
    colours = {label: to_hex(SIZES(at / max(1, len(labels) - 1))) for at, label in enumerate(labels)}
    names = {
        label: f"{label} ({count(n)})" if (n := parameters[label]) and axes[axis] == "size" else label
        for label in labels
    }
    return Look(axis, labels, colours, names)


def _parameters(trials: Sequence[TrialPoints], axis: str, label: str) -> float | None:
    found = [trial.scale.parameters for trial in trials if trial.at[axis] == label and trial.scale]
    return median(found) if found else None


def log_x(axes: Axes, form: Callable[[float], str], most: int = 5) -> None:
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, axes.get_xlim(), form, most)


def log_y(axes: Axes, form: Callable[[float], str] = PLAIN, most: int = 6) -> None:
    axes.set_yscale("log")
    _log_ticks(axes.yaxis, axes.get_ylim(), form, most)


def _log_ticks(axis: Axis, limits: tuple[float, float], form: Callable[[float], str], most: int) -> None:
    """Ticks at round numbers, however little of a decade there is. To be called when the limits are what they will
    be: those of the data are taken for that."""
    low, high = sorted(limits)
    for locator in (LogLocator(numticks=most + 3), LogLocator(subs=(1, 3)), LogLocator(subs=(1, 2, 5)), None):
        locator = locator or MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        if 3 <= len(ticks) <= most + 2:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    limit = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    limit(*limits)
