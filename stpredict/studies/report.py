"""The report of a study: report.html, and beside it every chart as PNG, every table as CSV, and analysis.json.

It can be written at any time: it says plainly what is missing. Torch-free. Its look is page.html.j2's.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from data_pipeline.disk import renamed
from stpredict.evaluation.charts import as_svg
from stpredict.evaluation.page import render
from stpredict.evaluation.units import count, power
from stpredict.jobs.config import StudyReportConfig
from stpredict.run import write_atomically
from stpredict.studies import cell_charts, charts, law_charts
from stpredict.studies.analyse import analyse
from stpredict.studies.analysis import Analysis, Estimate, Group
from stpredict.studies.cells import cell_table, crossed, places_of
from stpredict.studies.codes import code_table
from stpredict.studies.compare import chosen_of, comparison_of, to_compare
from stpredict.studies.config import Role
from stpredict.studies.forecasts import forecast_table
from stpredict.studies.headline import headline
from stpredict.studies.look import Look, look_of
from stpredict.studies.points import TrialPoints, read_trial
from stpredict.studies.tables import tables_of, why

# What the names of charts begin with.
CHARTS = (
    "curves", "final_losses", "laws", "joint_law", "frontier", "optimum", "learning_rates", "by_", "quality_", "cells",
)  # fmt: skip
STATES = ("done", "running", "pending", "preempted", "failed", "diverged", "not started")


class Chart(NamedTuple):
    name: str  # of its PNG
    svg: Markup


def write_study_report(config: StudyReportConfig, folder: Path) -> Path:
    """Writes what there is now of the study into ``folder``; returns the page."""
    trials = [read_trial(name, trial, config.analysis.metric) for name, trial in config.trials.items()]
    analysis = analyse(trials, config.axes, config.analysis)
    look, chosen = look_of(trials, config.axes), chosen_of(analysis)
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(trials, config.axes, analysis, look, chosen)
    for name, table in tables.items():
        table.write(folder / f"{name}.csv")
    write_atomically(folder / "analysis.json", analysis.model_dump_json(indent=1) + "\n")
    drawn = _Charts(folder)
    places, axes = places_of(trials, config.axes, look), crossed(trials, config.axes)
    result, good = headline(trials, config.axes, look, chosen)
    page = render(
        "study.html.j2",
        title=config.title,
        facts=[job for trial in trials for job in trial.jobs.values()],
        axes=_axes(config.axes, trials),
        result=result,
        good=good,
        counts={state: n for state in STATES if (n := Counter(trial.state for trial in trials)[state])},
        trials=trials,
        times=_times(trials),
        analysis=analysis,
        curves=drawn.add("curves", charts.curve_chart(trials, config.axes, look, chosen)),
        final=drawn.add("final_losses", charts.final_chart(trials, look, chosen)),
        groups=[_group(drawn, number, group, trials, look, analysis) for number, group in enumerate(analysis.groups)],
        not_fitted=_not_fitted(analysis.groups),
        left_out=[trial for group in analysis.groups for trial in group.left_out],
        comparisons=[
            _comparison(drawn, axis, trials, config.axes, look, chosen) for axis in to_compare(config.axes, trials)
        ],
        cells=cell_table(places, axes),
        cells_chart=drawn.add("cells", cell_charts.cell_chart(places, axes, look)),
        codes=code_table(places, axes),
        unfinished=[(trial, why(trial)) for trial in trials if trial.state != "done" or trial.problems],
        tables=tables,
        run=shlex.quote(str(folder.parent)),
        folder=folder,
    )
    drawn.remove_others()
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


class _Charts:
    """Those of this page, drawn for it and beside it."""

    def __init__(self, folder: Path):
        self.folder, self.names = folder, set()

    def add(self, name: str, figure: Figure | None) -> Chart | None:
        if figure is None:
            return None
        self.names.add(name)
        with renamed(self.folder / f"{name}.png") as temporary:  # two reports at once leave whole pictures
            figure.savefig(temporary, format="png", dpi=150)
        return Chart(name, Markup(as_svg(figure, salt=name)))

    def remove_others(self) -> None:
        """Those that an earlier page had, of what is no longer so."""
        for path in self.folder.glob("*.png"):
            if path.stem.startswith(CHARTS) and path.stem not in self.names:
                path.unlink()


def _axes(axes: Mapping[str, str], trials: Sequence[TrialPoints]) -> list[tuple[str, str, list[str]]]:
    return [(axis, role, list(dict.fromkeys(trial.at[axis] for trial in trials))) for axis, role in axes.items()]


def _times(trials: Sequence[TrialPoints]) -> dict[str, Any]:
    """Wall time of the study, from its first start to its last end, and the sum of its jobs'."""
    jobs = [job for trial in trials for job in trial.jobs.values() if job.status and job.status.started]
    if not jobs:
        return {"wall_s": None, "jobs_s": None, "jobs": 0}
    starts = [datetime.fromisoformat(job.status.started) for job in jobs]
    ends = [datetime.fromisoformat(job.status.finished) if job.status.finished else datetime.now(UTC) for job in jobs]
    return {
        "wall_s": (max(ends) - min(starts)).total_seconds(),
        "jobs_s": sum(job.wall_s or 0 for job in jobs),
        "jobs": len(jobs),
    }


def _group(
    drawn: _Charts, number: int, group: Group, trials: Sequence[TrialPoints], look: Look, analysis: Analysis
) -> dict[str, Any]:
    """The charts and tables of what was fitted to one group of trials."""
    end = f"_{number + 1}" if len(analysis.groups) > 1 else ""
    own = [trial for trial in trials if all(trial.at[axis] == label for axis, label in group.at.items())]
    metric = analysis.metric or "loss"
    found = {
        "laws": drawn.add(f"laws{end}", law_charts.law_chart(group, look, metric)),
        "joint": drawn.add(f"joint_law{end}", law_charts.joint_chart(group, look, metric)),
        "frontier": drawn.add(f"frontier{end}", law_charts.frontier_chart(group, look, metric)),
        "optimum": drawn.add(f"optimum{end}", law_charts.optimum_chart(group)),
        "learning_rates": drawn.add(f"learning_rates{end}", charts.learning_rate_chart(group, own, look)),
    }
    fits = [(law, [(name, _estimate(value)) for name, value in law.constants.items()]) for law in group.laws]
    predictions = [(one, count(one.parameters), count(one.tokens), _estimate(one.loss)) for one in group.predictions]
    has_something = any(found.values()) or bool(fits or group.warnings)
    return {"group": group, "fits": fits, "predictions": predictions, "has_something": has_something, **found}


def _not_fitted(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(laws, groups, why): those that were not fitted for the same reason, together."""
    where: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for group in groups:
        for law in group.not_fitted:
            laws, titles = where.setdefault(law.why, ({}, {}))
            laws[f"{law.name} {law.of}".strip()] = titles[group.title] = None
    return [
        (", ".join(laws), "" if len(titles) == len(groups) else "; ".join(titles), why)
        for why, (laws, titles) in where.items()
    ]


def _estimate(estimate: Estimate) -> str:
    """value (low to high)"""
    values = (estimate.value, estimate.low, estimate.high)
    value, low, high = (x if x is None else _number(x) for x in values)
    return value if low is None or high is None else f"{value} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else power(value)


def _comparison(
    drawn: _Charts,
    axis: str,
    trials: Sequence[TrialPoints],
    axes: Mapping[str, Role],
    look: Look,
    chosen: Mapping[str, bool],
) -> dict[str, Any]:
    found = comparison_of(axis, trials, axes, look, chosen)
    return {
        "axis": axis,
        "left_out": found.left_out,
        "over": found.over,
        "chart": drawn.add(f"by_{axis}", charts.axis_chart(axis, found.cells, look)),
        "forecasts": forecast_table(found.cells, look.axis != axis),
        "speed": drawn.add(f"quality_and_speed_by_{axis}", charts.speed_chart(axis, found.cells, look)),
    }
