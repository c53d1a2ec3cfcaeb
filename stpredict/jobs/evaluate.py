"""Measures what a generate job wrote: metrics.json, frames.png, and a table in the log; of what a reconstruct job
wrote, metrics.json and a line. One process does it."""

import logging
import os

from data_pipeline.errors import UsageError
from stpredict.evaluation.charts import frame_chart
from stpredict.evaluation.frame_prediction import evaluate
from stpredict.evaluation.generated import read_generated
from stpredict.evaluation.reconstructed import is_reconstructed, read_reconstructed
from stpredict.evaluation.reconstruction import evaluate_reconstruction
from stpredict.evaluation.results import as_text
from stpredict.jobs.config import EvaluateConfig
from stpredict.run import Progress, Run, write_atomically

log = logging.getLogger(__name__)


def run(config: EvaluateConfig, run: Run) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if is_reconstructed(Run(config.generated)):
        _reconstruction(config, run)
        return
    if config.lpips:
        raise UsageError(f"lpips: of a reconstruct job's run; {config.generated} is none")
    generated = read_generated(Run(config.generated))
    progress = Progress(run, len(generated.truth), "clip")
    evaluation = evaluate(generated, lambda done, _: progress.update(done, "measured"))
    write_atomically(run.path / "metrics.json", evaluation.model_dump_json(indent=1) + "\n")
    frame_chart(evaluation).savefig(run.path / "frames.png", dpi=150)
    log.info("%s", as_text(evaluation))


def _reconstruction(config: EvaluateConfig, run: Run) -> None:
    found = read_reconstructed(Run(config.generated))
    progress = Progress(run, len(found.truth), "clip")
    measured = evaluate_reconstruction(found, config.lpips, lambda done, _: progress.update(done, "measured"))
    write_atomically(run.path / "metrics.json", measured.model_dump_json(indent=1) + "\n")
    log.info("%s", measured.in_words())
