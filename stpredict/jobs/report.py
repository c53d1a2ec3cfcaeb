"""Writes report.html, one self-contained page about other runs. One process does it."""

import logging
import os

from stpredict.evaluation.report import write_report
from stpredict.jobs.config import ReportConfig
from stpredict.run import Run

log = logging.getLogger(__name__)


def run(config: ReportConfig, run: Run) -> None:
    if os.environ.get("RANK", "0") == "0":
        log.info("%s", write_report(config.title, config.runs, run.path / "report.html"))
