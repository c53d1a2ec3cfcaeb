"""Measures what a generate job wrote: metrics.json, frames.png, and a table in the log; of what a reconstruct job
wrote, metrics.json and a line; of what a forecast job wrote, metrics.json, lead_times.csv and .png, of fields
error_maps.png, and a table. One process does it."""

import logging
import os

from data_pipeline.config import Location
from data_pipeline.errors import UsageError
from stpredict.evaluation.charts import frame_chart
from stpredict.evaluation.climatology import Climatology, read_climatology
from stpredict.evaluation.forecast_charts import error_map_chart, lead_time_chart
from stpredict.evaluation.forecast_evaluation import evaluate_forecasts
from stpredict.evaluation.forecast_scores import as_csv
from stpredict.evaluation.forecast_scores import as_text as forecast_text
from stpredict.evaluation.forecasts import is_forecast, read_forecasts
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
    if (config.climatology or config.others) and not is_forecast(Run(config.generated)):
        key = "climatology" if config.climatology else "others"
        raise UsageError(f"{key}: of a forecast job's run; {config.generated} is none")
    if is_reconstructed(Run(config.generated)):
        _reconstruction(config, run)
        return
    if is_forecast(Run(config.generated)):
        _forecast(config, run)
        return
    if config.lpips:
        raise UsageError(f"lpips: of the run of a reconstruct or forecast job; {config.generated} is none")
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


def _forecast(config: EvaluateConfig, run: Run) -> None:
    found = read_forecasts(Run(config.generated))
    others = {name: read_forecasts(Run(path)) for name, path in config.others.items()}
    usual = None
    if config.climatology:
        if found.index.data == "frames":
            raise UsageError(f"climatology: of fields; {config.generated} forecasts video: leave it out")
        usual = _climatology(config.climatology, run)
    progress = Progress(run, len(found.truth), "sample")
    measured, maps = evaluate_forecasts(
        found, others, usual, config.lpips, lambda done, _: progress.update(done, "measured")
    )
    write_atomically(run.path / "metrics.json", measured.model_dump_json(indent=1) + "\n")
    write_atomically(run.path / "lead_times.csv", as_csv(measured))
    lead_time_chart(measured).savefig(run.path / "lead_times.png", dpi=150)
    if measured.data == "field":
        error_map_chart(measured, maps.bias, maps.rmse).savefig(run.path / "error_maps.png", dpi=150)
    log.info("%s", forecast_text(measured))


def _climatology(shards: Location, run: Run) -> Climatology:
    progress = Progress(run, None, "sample")
    return read_climatology(shards, lambda done, _: progress.update(done, "climatology"))
