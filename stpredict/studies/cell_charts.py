"""The chart of every cell of a study's grid, each seed a dot."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stpredict.evaluation.charts import INK, STYLE
from stpredict.studies.cells import Place
from stpredict.studies.charts import level_line
from stpredict.studies.look import Look, log_y
from stpredict.studies.measures import MEASURES, drawn, levels
from stpredict.studies.places import short

MOST = 100  # cells that can be told apart
GAP = 1  # between groups, in cells
WIDE = 110  # letters that have room side by side


def cell_chart(places: Sequence[Place], axes: Sequence[str], look: Look) -> Figure | None:
    """A panel for each measure, below each other: the places side by side, grouped by the other ``axes`` than the
    colours'; a dot for each trial, a dash for their mean; yardsticks where they are near. None where nothing is done,
    or there are too many places."""
    trials = [trial for place in places for trial in place.trials]
    panels = drawn(trials)
    if len(axes) < 2 or not panels or len(places) > MOST:
        return None
    others = [axis for axis in axes if axis != look.axis]
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(", ".join(short(place.at[axis], axis) for axis in others), []).append(place)
    starts = [0]
    for group in groups.values():
        starts.append(starts[-1] + len(group) + GAP)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.4 + 2.1 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for panel, (name, title) in zip(grid, panels.items(), strict=True):
            for x, place in _placed(groups, starts):
                values = [value for trial in place.trials if (value := MEASURES[name](trial)) is not None]
                _dots(panel, x, values, look.colours[place.at[look.axis]])
            panel.margins(y=0.1)
            _near(panel, levels(name, trials))
            if name not in ("psnr", "ssim") and panel.get_ylim()[0] > 0:
                log_y(panel)
            for start in starts[1:-1]:
                panel.axvline(start - (GAP + 1) / 2, color=INK, linewidth=0.6, alpha=0.3)
            panel.grid(axis="x", visible=False)
            panel.set(title=title, xlim=(-1, starts[-1] - GAP))
        _name_groups(grid[0], groups, starts, ", ".join(others))
        ticks = {x: place.at[look.axis] for x, place in _placed(groups, starts)}
        long = max(map(len, ticks.values())) * len(ticks) > WIDE
        panel.set_xticks(list(ticks), [short(label, look.axis) for label in ticks.values()], rotation=90 if long else 0)
        panel.tick_params(axis="x", labelsize=8)
    return figure


def _placed(groups: Mapping[str, Sequence[Place]], starts: Sequence[int]) -> Iterator[tuple[int, Place]]:
    for start, group in zip(starts, groups.values(), strict=False):
        yield from enumerate(group, start)


def _name_groups(panel: Axes, groups: Mapping[str, Sequence[Place]], starts: Sequence[int], axes: str) -> None:
    """Above it."""
    above = panel.secondary_xaxis("top")
    middles = [(start + end - GAP - 1) / 2 for start, end in pairwise(starts)]
    long = max(map(len, groups)) * len(groups) > WIDE
    above.set_xticks(middles, list(groups), rotation=20 if long else 0, ha="left" if long else "center")
    above.tick_params(axis="x", length=0)
    above.set_xlabel(axes, fontsize=8)
    above.spines["top"].set_visible(False)


def _dots(panel: Axes, x: float, values: Sequence[float], colour: str) -> None:
    if values:
        panel.plot([x] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)
        panel.plot([x - 0.35, x + 0.35], [mean(values)] * 2, color=colour, linewidth=1.8)


def _near(panel: Axes, levels: Mapping[str, float]) -> None:
    """Those yardsticks that are no further from the dots than these from each other: the dots keep their room."""
    low, high = panel.get_ylim()
    for name, level in levels.items():
        if low - (high - low) <= level <= high + (high - low):
            level_line(panel, name, level)
