"""Measures what a generate job wrote: metrics.json, frames.png, and a table in the log; of what a reconstruct job
wrote, metrics.json and a line; of what a forecast job wrote, metrics.json, lead_times.csv and .png, of fields
error_maps.png, and a table; of its forecaster's quantizer, where that is asked for, quantizer.json and pictures. One
process does it."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import Location
from data_pipeline.errors import UsageError
from stpredict.config import load
from stpredict.evaluation.charts import frame_chart
from stpredict.evaluation.climatology import Climatology, read_climatology
from stpredict.evaluation.forecast_charts import error_map_chart, lead_time_chart
from stpredict.evaluation.forecast_evaluation import check_forecasts, evaluate_forecasts
from stpredict.evaluation.forecast_scores import as_csv
from stpredict.evaluation.forecast_scores import as_text as forecast_text
from stpredict.evaluation.forecasts import Forecasts, is_forecast, read_forecasts
from stpredict.evaluation.frame_prediction import evaluate
from stpredict.evaluation.generated import read_generated
from stpredict.evaluation.quantizer_analysis import analyse, feature_maps
from stpredict.evaluation.quantizer_charts import density_chart, feature_map_chart
from stpredict.evaluation.quantizer_results import QuantizerAnalysis
from stpredict.evaluation.reconstructed import is_reconstructed, read_reconstructed
from stpredict.evaluation.reconstruction import evaluate_reconstruction
from stpredict.evaluation.results import as_text
from stpredict.forecasters.scaling import Scaling
from stpredict.jobs.config import EvaluateConfig, ForecastConfig
from stpredict.jobs.forecast import assembled
from stpredict.run import Progress, Run, write_atomically

log = logging.getLogger(__name__)


def run(config: EvaluateConfig, run: Run) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    of_forecasts = [key for key in ("climatology", "others", "quantizer_samples") if getattr(config, key)]
    if of_forecasts and not is_forecast(Run(config.generated)):
        raise UsageError(f"{of_forecasts[0]}: of a forecast job's run; {config.generated} is none")
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
    if config.climatology and found.index.data == "frames":
        raise UsageError(f"climatology: of fields; {config.generated} forecasts video: leave it out")
    check_forecasts(found, others, config.lpips)
    quantizing = _quantizing(config, found) if config.quantizer_samples else None
    # A whole training split is read for it: what is quick to find out comes before.
    usual = _climatology(config.climatology, found, run) if config.climatology else None
    analysed = _quantizer(config, *quantizing, found, run) if quantizing else None
    progress = Progress(run, len(found.truth), "sample")
    measured, maps = evaluate_forecasts(
        found, others, usual, config.lpips, lambda done, _: progress.update(done, "measured")
    )
    write_atomically(run.path / "metrics.json", measured.model_dump_json(indent=1) + "\n")
    write_atomically(run.path / "lead_times.csv", as_csv(measured))
    lead_time_chart(measured).savefig(run.path / "lead_times.png", dpi=150)
    if measured.data == "field":
        chart = error_map_chart(measured, maps.bias, maps.rmse, found.index.origin)
        chart.savefig(run.path / "error_maps.png", dpi=150)
    log.info("%s", forecast_text(measured))
    if analysed:
        log.info("%s", analysed.in_words())


@dataclass
class _Scaled:
    """Batches of what forecasters were given, as they saw it; gone through twice."""

    given: np.ndarray
    scaling: Scaling
    batch_size: int
    progress: Progress
    done: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.given), self.batch_size):
            batch = self.given[start : start + self.batch_size]
            yield self.scaling.scaled(torch.from_numpy(batch.copy()))
            self.done += len(batch)
            self.progress.update(self.done, "quantizer")


def _quantizing(config: EvaluateConfig, found: Forecasts) -> tuple[torch.nn.Module, int]:
    """The forecaster that made the forecasts, and samples of a batch. UsageError where it has no
    quantizer, or is another one by now."""
    job = load(ForecastConfig, Run(config.generated).config_path)
    forecaster, export = assembled(job)
    if getattr(forecaster, "quantizer", None) is None:
        raise UsageError(f"quantizer_samples: {job.forecaster} has no quantizer; leave it out")
    if export.step != found.index.forecaster_step:
        raise UsageError(
            f"quantizer_samples: {job.forecaster} is of step {export.step}, {config.generated} was made when it was of "
            f"step {found.index.forecaster_step}; run the forecast job again, or leave it out"
        )
    return forecaster, job.batch_size


def _quantizer(
    config: EvaluateConfig, forecaster: torch.nn.Module, batch_size: int, found: Forecasts, run: Run
) -> QuantizerAnalysis:
    """Of the forecaster that made the forecasts; writes quantizer.json, quantizer.png and feature_maps.png."""
    scaling = Scaling(tuple(found.index.offset), tuple(found.index.scale))
    given = found.given[: config.quantizer_samples]
    analysis = analyse(forecaster, _Scaled(given, scaling, batch_size, Progress(run, 2 * len(given), "sample")))
    write_atomically(run.path / "quantizer.json", analysis.model_dump_json(indent=1) + "\n")
    density_chart(analysis).savefig(run.path / "quantizer.png", dpi=150)
    maps = feature_maps(forecaster, scaling.scaled(torch.from_numpy(given[:1].copy()))[0])
    feature_map_chart(maps).savefig(run.path / "feature_maps.png", dpi=150)
    return analysis


def _climatology(shards: Location, found: Forecasts, run: Run) -> Climatology:
    progress = Progress(run, None, "sample")
    return read_climatology(
        shards,
        lambda done, _: progress.update(done, "climatology"),
        lambda begun: begun.check(found.truth.shape[2:], found.index),
    )
