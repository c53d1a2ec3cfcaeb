"""Charts of what a study's trials measured: validation curves, final losses, learning rates, quality and speed.

Those of the fitted laws are in law_charts.py.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean, stdev

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stpredict.evaluation.charts import INK, LINES, STYLE
from stpredict.evaluation.forecast_charts import LINES as FORECAST_LINES
from stpredict.studies.analysis import Group
from stpredict.studies.compare import Cell
from stpredict.studies.config import Role
from stpredict.studies.look import COUNT, FLOPS, GREY, PLAIN, Look, log_x, log_y
from stpredict.studies.measures import MEASURES, Measure, drawn, levels
from stpredict.studies.places import in_order, numbers_of, short
from stpredict.studies.points import TrialPoints, without_tokens

MANY = 40  # lines, which are thinner then
MOST_PANELS = 6
FEW = 3  # that are named in a legend
MOST_NAMED = 4  # diverged runs in one chart; the table names them all
FAINT = 0.25
YARDSTICK_LINES = {**LINES, **FORECAST_LINES}


def curve_chart(
    trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look, chosen: Mapping[str, bool]
) -> Figure:
    """Validation losses against steps, tokens and FLOPs; a row of panels for each value of the axes to compare, where
    they are few. Faint: those that are not ``chosen``, for their learning rate."""
    measures = {"step": (COUNT, lambda _: 1), "tokens": (COUNT, _tokens), "FLOPs": (FLOPS, _flops)}
    if without_tokens(trials):
        del measures["tokens"]
    rows, width = _panels(trials, axes, look), 1 if len(trials) <= MANY else 0.6
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.6 + (2.9 if len(rows) < 3 else 2.2) * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(measures), squeeze=False, sharey="row")
        for row, (title, there) in zip(grid, rows.items(), strict=True):
            for panel, (name, (form, per_step)) in zip(row, measures.items(), strict=True):
                for trial in there:
                    _curve(panel, trial, look, per_step(trial), 1 if chosen.get(trial.name, True) else FAINT, width)
                panel.set(title=title if panel is row[0] else "", xlabel=name)
                if not panel.lines:
                    _nothing(panel, "not known" if name != "step" else "no validation yet")
                    continue
                log_x(panel, form, most=4)
            if healthy := [loss for trial in there if not trial.diverged for loss in trial.losses if loss > 0]:
                room = (max(healthy) / min(healthy)) ** 0.05 or 1
                row[0].set_ylim(min(healthy) / room / 1.001, max(healthy) * room * 1.001)
                log_y(row[0])
            row[0].set_ylabel(f"validation {there[0].metric or 'loss'}" if there else "")
        more = []
        if gone := [trial.name for trial in trials if trial.diverged and trial.losses]:
            named = ", ".join(gone) if len(gone) < FEW else f"{len(gone)} trials"
            more.append(Line2D([], [], color=GREY, linestyle="--", label=f"diverged: {named}"))
        if not all(chosen.get(trial.name, True) for trial in trials if trial.losses and not trial.diverged):
            more.append(Line2D([], [], color=GREY, alpha=2 * FAINT, label="faint: other learning rates"))
        look.legend(figure, more)
    return figure


def _tokens(trial: TrialPoints) -> float | None:
    return trial.scale and trial.scale.tokens_per_step


def _flops(trial: TrialPoints) -> float | None:
    return trial.scale and trial.scale.flops_per_step


def _panels(trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look) -> dict[str, list[TrialPoints]]:
    others = [axis for axis, role in axes.items() if role == "other" and axis != look.axis]
    values = [in_order([trial.at[axis] for trial in trials], axis) for axis in others]
    places = list(product(*values))
    if not others or len(places) > MOST_PANELS:
        return {"": list(trials)}
    at = {", ".join(place): dict(zip(others, place, strict=True)) for place in places}
    return {
        title: [trial for trial in trials if all(trial.at[axis] == label for axis, label in where.items())]
        for title, where in at.items()
    }


def _curve(panel: Axes, trial: TrialPoints, look: Look, per_step: float | None, alpha: float, width: float) -> None:
    """A thin line; dots where it has few points. What diverged is grey and dashed, with its name."""
    points = [(step * per_step, loss) for step, loss in _finite(trial) if step > 0] if per_step else []
    if not points:
        return
    few = {"marker": "o", "markersize": 2.5} if len(points) < 12 else {}
    if not trial.diverged:
        panel.plot(*zip(*points, strict=True), color=look.of(trial), linewidth=width, alpha=alpha, **few)
        return
    panel.plot(*zip(*points, strict=True), color=GREY, linewidth=1, linestyle="--", **few)


def _finite(trial: TrialPoints) -> list[tuple[int, float]]:
    pairs = zip(trial.steps, trial.losses, strict=True)
    return [(step, loss) for step, loss in pairs if math.isfinite(loss) and loss > 0]


def final_chart(trials: Sequence[TrialPoints], look: Look, chosen: Mapping[str, bool]) -> Figure | None:
    """The last validation of each trial against its parameters; None where there is none, or all have as many."""
    there = [trial for trial in trials if trial.scale and _finite(trial)]
    healthy = [trial for trial in there if not trial.diverged]
    if len({trial.scale.parameters for trial in healthy}) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        panel = figure.subplots()
        for trial in healthy:
            full = chosen.get(trial.name, True)
            face = look.of(trial) if trial.done else "none"
            panel.plot(
                trial.scale.parameters, trial.final_loss, "o", color=look.of(trial), markerfacecolor=face,
                markersize=5, alpha=1 if full else FAINT,
            )  # fmt: skip
        panel.margins(x=0.1, y=0.12)
        log_x(panel, COUNT)
        log_y(panel)
        _at_the_top(panel, [trial for trial in there if trial.diverged], lambda trial: trial.scale.parameters)
        panel.set(title="last validation", xlabel="parameters", ylabel=healthy[0].metric)
        more = []
        if not all(trial.done for trial in healthy):
            more.append(Line2D([], [], linestyle="", marker="o", color=GREY, markerfacecolor="none", label="not done"))
        if any(trial.diverged for trial in there):
            more.append(Line2D([], [], linestyle="", marker="x", color=GREY, label="diverged (at the top)"))
        look.legend(figure, more)
    return figure


def _at_the_top(panel: Axes, diverged: Sequence[TrialPoints], x_of: Measure) -> None:
    """What diverged has no place on the scale of the others: crosses at the top, the first few with their names."""
    for number, trial in enumerate(diverged):
        x = x_of(trial)
        if x is None:
            continue
        panel.plot(x, 0.97, "x", color=GREY, transform=panel.get_xaxis_transform(), clip_on=False)
        if number < MOST_NAMED:
            right = _fraction(panel, x) > 0.6
            panel.annotate(
                trial.name, (x, 0.97), (-6 if right else 6, -3 - 9 * number), textcoords="offset points",
                xycoords=panel.get_xaxis_transform(), fontsize=7, color=GREY, ha="right" if right else "left",
            )  # fmt: skip


def _fraction(panel: Axes, x: float) -> float:
    (left, right), scale = panel.get_xlim(), math.log if panel.get_xscale() == "log" else float
    return (scale(x) - scale(left)) / (scale(right) - scale(left))


def learning_rate_chart(group: Group, trials: Sequence[TrialPoints], look: Look) -> Figure | None:
    """Mean loss of each size against the learning rate, the best one marked; None where no size has several."""
    several = [best for best in group.learning_rates if len(best.tried) > 1]
    if not several:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panel = figure.subplots()
        for best in several:
            colour = look.colours.get(best.size, LINES["prediction"]["color"])
            tried = sorted(best.tried, key=lambda one: one.learning_rate)
            rates, losses = [one.learning_rate for one in tried], [one.loss for one in tried]
            panel.errorbar(
                rates, losses, [one.spread or 0 for one in tried], color=colour, marker="o", markersize=3.5,
                linewidth=1.2, elinewidth=0.8, capsize=2,
            )  # fmt: skip
            loss = losses[rates.index(best.best)]
            panel.plot(best.best, loss, "*", color=colour, markersize=12, markeredgecolor=INK, markeredgewidth=0.6)
            if best.at_edge:
                panel.plot(best.best, loss, "o", color="#e5484d", markersize=17, markerfacecolor="none")
        panel.margins(x=0.08, y=0.12)
        log_x(panel, lambda value: f"{value:.0e}".replace("e-0", "e-"))
        rates = sorted({one.learning_rate for best in several for one in best.tried})
        if len(rates) <= 9:
            panel.xaxis.get_major_locator().locs = rates
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        log_y(panel)
        gone = [trial for trial in trials if trial.diverged and trial.learning_rate]
        _at_the_top(panel, gone, lambda trial: trial.learning_rate)
        panel.set(xlabel="learning rate", ylabel=f"{_metric(trials)}, mean of seeds")
        more = [Line2D([], [], linestyle="", marker="*", color=GREY, markersize=10, label="best")]
        if any(best.at_edge for best in several):
            ring = {"marker": "o", "color": "#e5484d", "markerfacecolor": "none", "markersize": 10}
            more.append(Line2D([], [], linestyle="", label="best is at the edge: try beyond", **ring))
        if gone:
            more.append(Line2D([], [], linestyle="", marker="x", color=GREY, label="diverged (at the top)"))
        look.legend(figure, more)
    return figure


def _metric(trials: Sequence[TrialPoints]) -> str:
    return next((trial.metric for trial in trials if trial.metric), "loss")


def axis_chart(axis: str, cells: Sequence[Cell], look: Look) -> Figure | None:
    """Final loss by the value of ``axis``; beside it, where they were measured, PSNR and SSIM or errors of forecasts
    against their yardsticks, and predicted frames per second. A dot for each trial, a line through the means of each
    colour's."""
    trials = [trial for cell in cells for trial in cell.trials]
    panels = drawn(trials)
    if not panels:
        return None
    labels = in_order([cell.label for cell in cells], axis)
    numbers = numbers_of(labels, axis)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10 if len(panels) > 2 else 4.2 * len(panels) + 1.5, 3.4), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (name, title) in zip(grid, panels.items(), strict=True):
            if look.axis == axis:
                _means(panel, cells, labels, numbers, MEASURES[name], look, GREY)
            for colour in {} if look.axis == axis else look.labels:
                own = [cell for cell in cells if cell.colour == colour]
                _means(panel, own, labels, numbers, MEASURES[name], look, look.colours[colour])
            for method, level in levels(name, trials).items():
                level_line(panel, method, level)
            panel.set(
                title=title, xlabel=f"{axis} (tokens)" if numbers and "x" in labels[0].removeprefix(axis) else axis
            )
            panel.margins(x=0.1, y=0.12)
            if name == "frames_per_s":
                log_y(panel)
            _ticks(panel, [short(label, axis) for label in labels], numbers)
        if look.axis != axis:
            look.legend(figure)
    return figure


def _means(
    panel: Axes,
    cells: Sequence[Cell],
    labels: Sequence[str],
    numbers: Mapping[str, float] | None,
    of: Measure,
    look: Look,
    line: str,
) -> None:
    """A dot for each trial, and a line of the colour ``line`` through the means of the cells, with their spread."""
    means = []
    for cell in sorted(cells, key=lambda cell: labels.index(cell.label)):
        values = [value for trial in cell.trials if (value := of(trial)) is not None]
        if not values:
            continue
        x = numbers[cell.label] if numbers else labels.index(cell.label)
        colour = look.colours[cell.colour]
        panel.plot([x] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.6, zorder=3)
        spread = stdev(values) if len(values) > 1 else 0
        panel.errorbar(x, mean(values), spread, color=colour, capsize=3, marker="_", zorder=3)
        means.append((x, mean(values)))
    if means:
        panel.plot(*zip(*means, strict=True), color=line, linewidth=1.1)


def level_line(panel: Axes, name: str, level: float) -> None:
    """Of a yardstick, with its name."""
    style = {**YARDSTICK_LINES[name], "marker": ""}
    panel.axhline(level, linewidth=1, **style)
    panel.annotate(
        name, (0.99, level), (0, 2), xycoords=panel.get_yaxis_transform(), textcoords="offset points",
        fontsize=7, color=style["color"], ha="right",
    )  # fmt: skip


def _ticks(panel: Axes, labels: Sequence[str], numbers: Mapping[str, float] | None) -> None:
    if numbers and min(numbers.values()) > 0 and max(numbers.values()) > 8 * min(numbers.values()):
        panel.set_xscale("log")
    at = list(numbers.values()) if numbers else list(range(len(labels)))
    texts = [f"{value:g}" for value in at] if numbers else list(labels)
    long = max(map(len, texts)) * len(texts) > 24
    panel.set_xticks(at, texts, rotation=35 if long else 0, ha="right" if long else "center")
    panel.set_xticks([], minor=True)


def speed_chart(axis: str, cells: Sequence[Cell], look: Look) -> Figure | None:
    """Quality against speed: means of what has both, each dot named by its value of ``axis``; None where nothing has.

    Lines join the dots of a colour, in the order of the axis."""
    both = [(cell, [trial for trial in cell.trials if trial.speed and trial.evaluation]) for cell in cells]
    both = [(cell, trials) for cell, trials in both if trials]
    if not both:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for panel, score, title in zip(figure.subplots(1, 2), ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
            for colour in [None] if look.axis == axis else look.labels:
                own = [(cell, trials) for cell, trials in both if colour in (None, cell.colour)]
                if own:
                    _quality_by_speed(panel, axis, own, score, look, look.colours.get(colour, GREY))
            panel.margins(x=0.15, y=0.15)
            log_x(panel, PLAIN)
            panel.set(title=title, xlabel="predicted frames per second and rank")
        if look.axis != axis:
            look.legend(figure)
    return figure


def _quality_by_speed(panel: Axes, axis: str, own, score: str, look: Look, line: str) -> None:
    places = [
        (
            mean(trial.speed.frames_per_s for trial in trials),
            mean(getattr(trial.evaluation.prediction, score) for trial in trials),
        )
        for _, trials in own
    ]
    panel.plot(*zip(*places, strict=True), color=line, linewidth=0.8, alpha=0.6)
    for number, ((cell, _), place) in enumerate(zip(own, places, strict=True)):
        panel.plot(*place, "o", color=look.colours[cell.colour], markersize=5)
        left = number % 2 == 1
        panel.annotate(
            short(cell.label, axis), place, (-6 if left else 6, 3), textcoords="offset points", fontsize=7,
            ha="right" if left else "left",
        )  # fmt: skip


def _nothing(panel: Axes, words: str) -> None:
    panel.text(0.5, 0.5, words, ha="center", va="center", transform=panel.transAxes, color=GREY)
    panel.set(xticks=[], yticks=[])
