"""The report of a study's run, at any time: whatever has become of its trials, and wherever the run is now."""

from pathlib import Path

import yaml

from launcher.record import PipelineRun
from launcher.rundir import refuse_foreign
from stpredict.config import as_yaml
from stpredict.jobs.config import StudyReportConfig
from stpredict.run import Run


def report_of(path: Path) -> StudyReportConfig | None:
    """The config of the report of the study whose run ``path`` is; None where it is that of no study.

    The runs are those that are there: a run may be read elsewhere than it was written.
    """
    run = PipelineRun(path)
    try:
        jobs = yaml.safe_load(run.pipeline_path.read_text())["jobs"]
    except FileNotFoundError:
        return None
    name = next((name for name, job in jobs.items() if job.get("set", {}).get("kind") == "study_report"), None)
    if name is None or not run.config_path(name).is_file():
        return None
    config = run.config(name)
    trials = {
        trial: found.model_copy(update={"runs": {job: _here(run, there, jobs) for job, there in found.runs.items()}})
        for trial, found in config.trials.items()
    }
    return config.model_copy(update={"run": path / name, "trials": trials})


def _here(run: PipelineRun, there: Path, jobs: dict) -> Path:
    return run.path / there.name if there.name in jobs else there


def write_report_of(config: StudyReportConfig) -> Path:
    """Writes the page where the study's own job will write it; returns its path."""
    from stpredict.studies.report import write_study_report  # matplotlib: seconds

    run = Run(config.run)
    if not run.config_path.is_file():
        refuse_foreign(run.path)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(as_yaml(config))  # by which that job knows the folder for its own
    return write_study_report(config, run.path)
