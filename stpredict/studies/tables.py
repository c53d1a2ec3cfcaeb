"""The tables of a study's report, as CSV files: what a chart shows can be drawn anew from them. Torch-free.

Numbers are written with all their digits, what is not known as nothing.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.disk import renamed
from stpredict.studies.analysis import Analysis, Estimate
from stpredict.studies.cells import places_of, yardsticks_of
from stpredict.studies.codes import CODES
from stpredict.studies.compare import comparison_of, spread, to_compare
from stpredict.studies.config import Role
from stpredict.studies.forecasts import MEASURED, of_trial
from stpredict.studies.look import Look
from stpredict.studies.measures import MEASURES
from stpredict.studies.points import TrialPoints

ALL = {**MEASURES, **{name: of for name, (_, of) in CODES.items()}}
SPREADS = [f"{name}{end}" for name in ALL for end in ("", "_sd")]


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def by(
        cls, axes: Iterable[str], columns: Sequence[str], rows: Sequence[Sequence[Any]], first: Sequence[str]
    ) -> "Table":
        """Rows of ``first``, the place on each of ``axes``, then ``columns``: an axis that is called as one of these
        (a study may compare losses) is axis_NAME."""
        others = (*first, *columns)
        return cls([*first, *(f"axis_{axis}" if axis in others else axis for axis in axes), *columns], rows)

    def write(self, path: Path) -> None:
        with renamed(path) as temporary, temporary.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(self.columns)
            lines.writerows(self.rows)


def tables_of(
    trials: Sequence[TrialPoints],
    axes: Mapping[str, Role],
    analysis: Analysis,
    look: Look,
    chosen: Mapping[str, bool],
) -> dict[str, Table]:
    """Name of the file without .csv → table."""
    return {
        "runs": runs_table(trials, axes),
        "validations": _validations(trials, axes),
        "comparisons": _comparisons(trials, axes, look, chosen),
        "cells": _cells(trials, axes, look),
        "learning_rates": _learning_rates(analysis),
        "fits": _fits(analysis),
        "fit_points": _fit_points(analysis),
        "frontier": _frontier(analysis),
        "iso_flops": _iso_flops(analysis),
        "predictions": _predictions(analysis),
    }


def runs_table(trials: Sequence[TrialPoints], axes: Mapping[str, Role]) -> Table:
    """One line for each trial."""
    return Table.by(
        axes,
        [
            *("state", "why", "parameters", "embedding_parameters", "learning_rate", "step", "tokens"),
            *("flops", "metric", "loss", "training_s", "memory_gb", "block_tokens", "psnr", "ssim", "frames_per_s"),
            *("frames_per_s_with_tokenizer", *(f"forecast_{name}" for name in MEASURED), *CODES, "run"),
        ],
        [
            [
                *(trial.name, *(trial.at[axis] for axis in axes), trial.state, why(trial)),
                *((trial.scale.parameters, trial.scale.embedding_parameters) if trial.scale else (None, None)),
                *(trial.learning_rate, trial.steps[-1] if trial.steps else None, trial.tokens, trial.flops),
                *(trial.metric, trial.final_loss, trial.seconds, trial.memory_gb, trial.block_tokens),
                *((e.prediction.psnr, e.prediction.ssim) if (e := trial.evaluation) else (None, None)),
                *((s.frames_per_s, s.frames_per_s_whole) if (s := trial.speed) else (None, None)),
                *(of_trial(trial, name) for name in MEASURED),
                *(of(trial) for _, of in CODES.values()),
                str(trial.run.path),
            ]
            for trial in trials
        ],
        first=["trial"],
    )


def why(trial: TrialPoints) -> str:
    """What is to be said of a trial that is not done, in one line."""
    said = [trial.diverged] if trial.diverged else []
    return "; ".join([*said, *(problem for problem in trial.problems if not said or said[0] not in problem)])


def _validations(trials: Sequence[TrialPoints], axes: Mapping[str, Role]) -> Table:
    """One line for each validation of each trial whose size is known."""
    rows = []
    for trial in trials:
        if trial.scale is None:
            continue
        for step, loss in zip(trial.steps, trial.losses, strict=True):
            flops = trial.scale.flops_per_step and step * trial.scale.flops_per_step
            tokens = step * trial.scale.tokens_per_step
            place = [trial.at[axis] for axis in axes]
            rows.append([trial.name, *place, trial.scale.parameters, step, tokens, flops, loss])
    return Table.by(axes, ["parameters", "step", "tokens", "flops", "loss"], rows, first=["trial"])


def _comparisons(
    trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look, chosen: Mapping[str, bool]
) -> Table:
    """Means over what shares a value of an axis to compare and a colour of the charts; sd: between them."""
    rows = []
    for axis in to_compare(axes, trials):
        for cell in comparison_of(axis, trials, axes, look, chosen).cells:
            rows.append([axis, cell.label, cell.colour, len(cell.trials), *_spreads(cell.trials)])
    return Table.by([look.axis], ["trials", *SPREADS], rows, first=["axis", "value"])


def _spreads(trials: Sequence[TrialPoints]) -> list[float | None]:
    found = [spread([of(trial) for trial in trials]) for of in ALL.values()]
    return [value for pair in found for value in pair]


def _cells(trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look) -> Table:
    """One line for each place on all axes but the seed, then one for each yardstick; sd: between trials, those of a
    place being its seeds."""
    places = places_of(trials, axes, look)
    others = [axis for axis, role in axes.items() if role != "seed"]
    rows = [["prediction", *p.at.values(), p.planned, len(p.trials), p.evaluated, *_spreads(p.trials)] for p in places]
    for method, n, values in yardsticks_of([trial for place in places for trial in place.trials], list(ALL)):
        rows.append([method, *[None] * len(others), None, n, n, *(value for pair in values for value in pair)])
    return Table.by(others, ["planned", "trials", "evaluated", *SPREADS], rows, first=["method"])


def _learning_rates(analysis: Analysis) -> Table:
    columns = ["group", "size", "of", "parameters", "learning_rate", "loss", "spread", "seeds", "best", "at_edge"]
    return Table(
        [*columns, "diverges_at", "vertex"],
        [
            [
                *(group.title, best.size, best.of, best.parameters, one.learning_rate, one.loss, one.spread, one.seeds),
                *(one.learning_rate == best.best, best.at_edge, best.diverges_at, best.vertex),
            ]
            for group in analysis.groups
            for best in group.learning_rates
            for one in best.tried
        ],
    )


def _fits(analysis: Analysis) -> Table:
    """One line for each constant of each law; those that were not fitted, with the reason."""
    rows = []
    for group in analysis.groups:
        for law in group.laws:
            for constant, estimate in law.constants.items():
                place = [group.title, law.name, law.of, law.form, law.others or len(law.points) or None, law.scatter]
                rows.append([*place, constant, *_interval(estimate), law.interval, "; ".join(law.warnings), ""])
        for law in group.not_fitted:
            rows.append([group.title, law.name, law.of, *[None] * 9, law.why])
    columns = ["group", "law", "of", "form", "points", "scatter", "constant", "value", "low", "high", "interval"]
    return Table([*columns, "warnings", "not_fitted"], rows)


def _interval(estimate: Estimate) -> Iterable[float | None]:
    return estimate.value, estimate.low, estimate.high


def _fit_points(analysis: Analysis) -> Table:
    columns = ["group", "law", "of", "trials", "size", "parameters", "tokens", "flops", "measured", "fitted"]
    return Table(
        [*columns, "residual"],
        [
            [
                *(group.title, law.name, law.of, " ".join(point.trials), point.size, point.parameters, point.tokens),
                *(point.flops, point.measured, point.fitted, point.residual),
            ]
            for group in analysis.groups
            for law in group.laws
            for point in law.points
        ],
    )


def _frontier(analysis: Analysis) -> Table:
    return Table(
        ["group", "flops", "parameters", "tokens", "loss", "size", "edge"],
        [
            [group.title, point.flops, point.parameters, point.tokens, point.loss, point.size, point.edge]
            for group in analysis.groups
            for point in group.frontier
        ],
    )


def _iso_flops(analysis: Analysis) -> Table:
    """The points of each slice, and its least by the parabola, or why there is none."""
    rows = []
    for group in analysis.groups:
        for iso in group.iso_flops:
            for point in iso.points:
                rows.append(
                    [group.title, iso.flops, "measured", point.size, point.parameters, point.tokens, point.loss]
                )
            if best := iso.optimum:
                rows.append([group.title, iso.flops, "least", best.size, best.parameters, best.tokens, best.loss])
            else:
                rows.append([group.title, iso.flops, f"no least: {iso.why_not}", *[None] * 4])
    return Table(["group", "flops", "what", "size", "parameters", "tokens", "loss"], rows)


def _predictions(analysis: Analysis) -> Table:
    columns = ["group", "law", "of", "parameters", "tokens", "loss", "low", "high", "extrapolation", "factor"]
    return Table(
        [*columns, "token_factor", "warnings"],
        [
            [
                *(group.title, one.law, one.of, one.parameters, one.tokens, *_interval(one.loss), one.extrapolation),
                *(one.factor, one.token_factor, "; ".join(one.warnings)),
            ]
            for group in analysis.groups
            for one in group.predictions
        ],
    )
