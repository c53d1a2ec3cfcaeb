"""The report of a study: report.html, and the tables and pictures that are in it. Torch-free."""

import csv
from pathlib import Path

from data_pipeline.disk import renamed
from stpredict.jobs.config import StudyReportConfig
from stpredict.studies.points import TrialPoints, read_trial


def write_study_report(config: StudyReportConfig, folder: Path) -> Path:
    """Writes what there is now of the study into ``folder``; returns the page."""
    trials = [read_trial(name, trial, config.analysis.metric) for name, trial in config.trials.items()]
    folder.mkdir(parents=True, exist_ok=True)
    _write_validations(folder / "validations.csv", config, trials)
    return folder / "report.html"


def _write_validations(path: Path, config: StudyReportConfig, trials: list[TrialPoints]) -> None:
    """One line for each validation of each trial."""
    with renamed(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", *config.axes, "parameters", "step", "tokens", "flops", "loss"])
        for trial in trials:
            if trial.scale is None:
                continue
            for step, loss in zip(trial.steps, trial.losses, strict=True):
                flops = trial.scale.flops_per_step and step * trial.scale.flops_per_step
                place = [trial.at[axis] for axis in config.axes]
                tokens = step * trial.scale.tokens_per_step
                table.writerow([trial.name, *place, trial.scale.parameters, step, tokens, flops, loss])
