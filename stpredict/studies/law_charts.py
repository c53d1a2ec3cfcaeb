"""Charts of what was fitted: laws with their intervals, residuals and extrapolation, the joint law, the frontier."""

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stpredict.evaluation.charts import INK, STYLE
from stpredict.studies.analysis import Group, IsoFlop, Law, LawName, Point, Prediction
from stpredict.studies.look import COUNT, FLOPS, GREY, LAW, PLAIN, SIZES, Look, log_x, log_y

AXES: dict[LawName, tuple[str, Callable[[float], str], Callable[[Point], float | None]]] = {
    "L(N)": ("parameters N", COUNT, lambda point: point.parameters),
    "L(D)": ("tokens D", COUNT, lambda point: point.tokens),
    "L(C)": ("FLOPs C", FLOPS, lambda point: point.flops),
}
BEYOND = {"color": GREY, "alpha": 0.13, "linewidth": 0}
MOST_BANDS = 4  # of laws in one panel
MOST_NAMED = 4


def law_chart(group: Group, look: Look, metric: str) -> Figure | None:
    """L(N), L(D) and L(C) with what they were fitted to, and the residuals; None where none was fitted."""
    names = [name for name in AXES if group.find(name)]
    if not names:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.9), layout="constrained")
        grid = figure.subplots(2, len(names), squeeze=False, sharex="col", height_ratios=[3, 1])
        for (panel, below), name in zip(grid.T, names, strict=True):
            _laws(panel, below, name, group, look)
            panel.set(title=name, ylabel=metric if name == names[0] else "")
            below.set(xlabel=AXES[name][0], ylabel="residual (ln)" if name == names[0] else "")
        figure.legend(handles=_key(group), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _laws(panel: Axes, below: Axes, name: LawName, group: Group, look: Look) -> None:
    laws, (_, form, x_of) = group.find(name), AXES[name]
    for number, law in enumerate(laws):
        colour = look.colours.get(law.of) or (LAW if len(laws) == 1 else SIZES(number / (len(laws) - 1)))
        _law(panel, law, colour, band=len(laws) <= MOST_BANDS)
        for point in law.points:
            own = look.colours.get(point.size, colour)
            panel.plot(x_of(point), point.measured, "o", color=own, markersize=3.5, zorder=3)
            below.plot(x_of(point), point.residual, "o", color=own, markersize=3)
        if len(laws) > 1 and len(laws) <= MOST_NAMED and law.curve:
            panel.annotate(
                law.of, (law.curve[-1].x, law.curve[-1].fitted.value), (-2, 3), textcoords="offset points",
                fontsize=7, ha="right", color=colour,
            )  # fmt: skip
    if name == "L(N)":
        for prediction in group.predictions:
            if prediction.law == "L(N)":
                _predicted(panel, prediction)
    below.axhline(0, color=INK, linewidth=0.8)
    log_x(panel, form, most=4)
    log_x(below, form, most=4)
    panel.set_yscale("log")
    predicted = [one.loss.value for one in group.predictions if one.law == name == "L(N)"]
    _fit_y(panel, laws, predicted)
    log_y(panel)
    _shade(panel, [curve for law in laws for curve in law.curve])
    _centre(below)


def _centre(below: Axes) -> None:
    most = 1.15 * max(map(abs, below.dataLim.intervaly), default=0) or 0.01
    below.set_ylim(-most, most)


def _fit_y(panel: Axes, laws: Sequence[Law], more: Sequence[float] = ()) -> None:
    """The y axis holds points and laws; of the intervals, which grow without end, as much as has room beside them."""
    inner = [
        *(point.fitted.value for law in laws for point in law.curve),
        *(point.measured for law in laws for point in law.points),
        *more,
    ]
    ends = [end for law in laws for point in law.curve for end in (point.fitted.low, point.fitted.high)]
    inner, ends = ([value for value in values if value is not None and value > 0] for values in (inner, ends))
    if not inner:
        return
    low, high = min(inner), max(inner)
    room = (high / low) ** 0.4 * 1.01
    low, high = max(low / room, min([*ends, low])), min(high * room, max([*ends, high]))
    edge = (high / low) ** 0.04
    panel.set_ylim(low / edge, high * edge)


def _law(panel: Axes, law: Law, colour: str, band: bool) -> None:
    x = np.array([point.x for point in law.curve])
    y = np.array([point.fitted.value for point in law.curve])
    beyond = np.array([point.extrapolation for point in law.curve], dtype=bool)
    panel.plot(x, np.where(beyond, np.nan, y), color=colour, linewidth=1.4)
    panel.plot(x, np.where(beyond, y, np.nan), color=colour, linewidth=1.4, linestyle="--")
    ends = [(point.fitted.low, point.fitted.high) for point in law.curve]
    if band and ends and None not in ends[0]:
        panel.fill_between(x, *np.array(ends, dtype=float).T, color=colour, alpha=0.18, linewidth=0)


def _shade(panel: Axes, curve: Sequence) -> None:
    """Where no law of the panel was fitted."""
    inside = [point.x for point in curve if not point.extrapolation]
    if not inside or not any(point.extrapolation for point in curve):
        return
    left, right = panel.get_xlim()
    if any(point.extrapolation and point.x > max(inside) for point in curve):
        panel.axvspan(max(inside), right, **BEYOND)
        panel.annotate(
            "extrapolation", (right, 0.98), (-3, 0), xycoords=panel.get_xaxis_transform(), va="top", ha="right",
            textcoords="offset points", fontsize=7, color=GREY,
        )  # fmt: skip
    if any(point.extrapolation and point.x < min(inside) for point in curve):
        panel.axvspan(left, min(inside), **BEYOND)
    panel.set_xlim(left, right)


def _predicted(panel: Axes, prediction: Prediction) -> None:
    loss = prediction.loss
    error = None if loss.low is None else [[max(0, loss.value - loss.low)], [max(0, loss.high - loss.value)]]
    panel.errorbar(
        prediction.parameters, loss.value, error, marker="D", markersize=5, color=INK, markerfacecolor="none", capsize=3
    )


def _key(group: Group) -> list:
    lines = [
        Line2D([], [], linestyle="", marker="o", color=GREY, label="measured"),
        Line2D([], [], color=GREY, label="fitted"),
        Patch(color=GREY, alpha=0.3, linewidth=0, label="interval"),
    ]
    if any(point.extrapolation for law in group.laws for point in law.curve if law.name in AXES):
        lines.append(Line2D([], [], color=GREY, linestyle="--", label="extrapolated"))
    if any(prediction.law == "L(N)" for prediction in group.predictions):
        lines.append(Line2D([], [], linestyle="", marker="D", color=INK, markerfacecolor="none", label="prediction"))
    return lines


def joint_chart(group: Group, look: Look, metric: str) -> Figure | None:
    """The joint law L(N, D): as one line for each N over the tokens, and predicted against measured."""
    if not (laws := group.find("L(N, D)")):
        return None
    law = laws[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplot_mosaic([["lines", "against"], ["below", "against"]], height_ratios=[3, 1])
        lines, below, against = panels["lines"], panels["below"], panels["against"]
        tokens = [point.tokens for point in law.points]
        for size in dict.fromkeys(point.size for point in law.points):
            own = [point for point in law.points if point.size == size]
            colour = look.colours.get(size, LAW)
            first, last = min(point.tokens for point in own), max(point.tokens for point in own)
            for ends, style in (((min(tokens), first), "--"), ((first, last), "-"), ((last, max(tokens) * 3), "--")):
                x = np.geomspace(*ends, 40)
                y = [law.at(parameters=own[0].parameters, tokens=d) for d in x]
                lines.plot(x, y, color=colour, linewidth=1.2, linestyle=style)
            lines.plot([p.tokens for p in own], [p.measured for p in own], "o", color=colour, markersize=3)
            below.plot([p.tokens for p in own], [p.residual for p in own], "o", color=colour, markersize=2.5)
            against.plot([p.measured for p in own], [p.fitted for p in own], "o", color=colour, markersize=3)
        ends = against.get_xlim()
        against.plot(ends, ends, color=INK, linewidth=0.8)
        below.axhline(0, color=INK, linewidth=0.8)
        _centre(below)
        below.set(xlabel="tokens D", ylabel="residual (ln)")
        lines.set(title="L(N, D) at each N", ylabel=metric)
        against.set(title="fitted against measured", xlabel=f"measured {metric}", ylabel="fitted")
        log_x(lines, COUNT)
        below.set(xscale="log", xlim=lines.get_xlim())
        log_x(below, COUNT)
        log_y(lines)
        log_x(against, PLAIN)
        log_y(against, PLAIN)
        beyond = Line2D([], [], color=GREY, linestyle="--", label="dashed: extrapolation")
        look.legend(figure, [beyond])
    return figure


def frontier_chart(group: Group, look: Look, metric: str) -> Figure | None:
    """Losses of the sizes at equal C with the parabolas through their least, and the least over C; None where there is
    neither."""
    if not group.iso_flops and not group.frontier:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        slices, frontier = figure.subplots(1, 2)
        ordered = sorted(group.iso_flops, key=lambda iso: iso.flops)
        for iso in ordered:
            _slice(slices, iso, look)
        slices.margins(x=0.12)
        slices.set(
            title="the sizes at equal FLOPs, and the least of their parabola", xlabel="parameters N", ylabel=metric
        )
        if ordered:
            log_x(slices, COUNT)
            log_y(slices)
        for point in group.frontier:
            face = "none" if point.edge else look.colours.get(point.size, LAW)
            frontier.plot(
                point.flops, point.loss, "o", color=look.colours.get(point.size, LAW), markerfacecolor=face,
                markersize=4.5,
            )  # fmt: skip
        for law in group.find("L(C)"):
            _law(frontier, law, LAW, band=True)
            frontier.set_yscale("log")
            _fit_y(frontier, [law], [point.loss for point in group.frontier])
        frontier.set(title="the least loss at each C", xlabel="FLOPs C")
        if group.frontier:
            log_x(frontier, FLOPS)
            log_y(frontier)
            _shade(frontier, [point for law in group.find("L(C)") for point in law.curve])
        hollow = Line2D(
            [], [], linestyle="", marker="o", color=GREY, markerfacecolor="none", label="right: best is an edge size"
        )
        look.legend(figure, [hollow])
    return figure


def _slice(panel: Axes, iso: IsoFlop, look: Look) -> None:
    """The sizes at one C, in their colours, and its parabola; without one, straight lines, dotted."""
    points = sorted(iso.points, key=lambda point: point.parameters)
    n, losses = np.array([point.parameters for point in points]), np.array([point.loss for point in points])
    for point in points:
        panel.plot(point.parameters, point.loss, "o", color=look.colours.get(point.size, LAW), markersize=4, zorder=3)
    if iso.parabola and len(points) > 1:
        u = np.linspace(np.log(n[0]), np.log(n[-1]), 60)
        y = iso.parabola[0] + iso.parabola[1] * u + iso.parabola[2] * u**2
        near = y < 1.1 * max(losses)
        panel.plot(np.exp(u[near]), y[near], color=GREY, linewidth=1.2)
    else:
        panel.plot(n, losses, color=GREY, linewidth=0.9, linestyle=":")
    if iso.optimum:
        panel.plot(
            iso.optimum.parameters, iso.optimum.loss, "o", color=INK, markerfacecolor="none", markersize=8, zorder=4
        )
    if len(points):
        panel.annotate(
            FLOPS(iso.flops), (n[-1], losses[-1]), (6, 0), textcoords="offset points", fontsize=7, color=GREY,
            va="center",
        )  # fmt: skip


def optimum_chart(group: Group) -> Figure | None:
    """The best N and D at each C; None where neither is fitted nor measured."""
    laws = {name: group.find(name) for name in ("N_opt(C)", "D_opt(C)")}
    best = [iso for iso in group.iso_flops if iso.optimum]
    if not any(laws.values()):
        return None
    colours = {"parabolas": LAW, "envelope": "#e08a00", "joint law": "#12a150"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for panel, (name, found) in zip(figure.subplots(1, 2), laws.items(), strict=True):
            of = (lambda p: p.parameters) if name == "N_opt(C)" else (lambda p: p.tokens)
            panel.plot([iso.flops for iso in best], [of(iso.optimum) for iso in best], "o", color=INK, markersize=4,
                       markerfacecolor="none")  # fmt: skip
            for law in found:
                colour = colours.get(law.of, LAW)
                _law(panel, law, colour, band=len(found) <= MOST_BANDS)
                if law.of == "envelope":
                    panel.plot([p.flops for p in law.points], [p.measured for p in law.points], ".", color=colour)
            panel.set(title=name, xlabel="FLOPs C", ylabel="parameters" if name == "N_opt(C)" else "tokens")
            log_x(panel, FLOPS)
            panel.set_yscale("log")
            _fit_y(panel, found, [of(iso.optimum) for iso in best])
            log_y(panel, COUNT)
            _shade(panel, [point for law in found for point in law.curve])
        names = dict.fromkeys(law.of for found in laws.values() for law in found)
        handles = [Line2D([], [], color=colours.get(of, LAW), label=of or "fitted") for of in names]
        if any(point.extrapolation for found in laws.values() for law in found for point in law.curve):
            handles.append(Line2D([], [], color=GREY, linestyle="--", label="extrapolated"))
        if best:
            ring = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}
            handles.append(Line2D([], [], color=INK, label="least of a parabola", **ring))
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure
