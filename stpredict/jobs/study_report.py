"""Writes the report of a study: what its trials found so far. One process does it."""

import logging
import os

from stpredict.jobs.config import StudyReportConfig
from stpredict.run import Run
from stpredict.studies.report import write_study_report

log = logging.getLogger(__name__)


def run(config: StudyReportConfig, run: Run) -> None:
    if os.environ.get("RANK", "0") == "0":
        log.info("%s", write_study_report(config, run.path))
