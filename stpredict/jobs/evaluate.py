"""Measures what a generate job wrote: metrics.json, frames.png, and a table in the log. One process does it."""

import logging
import os

from rich.console import Console
from rich.table import Table

from stpredict.evaluation.charts import frame_chart
from stpredict.evaluation.frame_prediction import evaluate
from stpredict.evaluation.generated import read_generated
from stpredict.evaluation.results import Evaluation
from stpredict.jobs.config import EvaluateConfig
from stpredict.run import Progress, Run, write_atomically

log = logging.getLogger(__name__)


def run(config: EvaluateConfig, run: Run) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    generated = read_generated(Run(config.generated))
    progress = Progress(run, len(generated.truth), "clip")
    evaluation = evaluate(generated, lambda done, _: progress.update(done, "measured"))
    write_atomically(run.path / "metrics.json", evaluation.model_dump_json(indent=1) + "\n")
    frame_chart(evaluation).savefig(run.path / "frames.png", dpi=150)
    log.info("%s", as_text(evaluation))


def as_text(evaluation: Evaluation) -> str:
    """The means as a table, then the verdict and what the tokenizer does."""
    frames = evaluation.frame_numbers
    table = Table(
        "method",
        "PSNR (dB)",
        "SSIM",
        "MSE",
        title=f"mean over {evaluation.clips} clips, frames {frames[0]} to {frames[-1]}",
    )
    for name, scores in evaluation.methods.items():
        table.add_row(name, f"{scores.psnr:.2f}", f"{scores.ssim:.4f}", f"{scores.mse:.6f}")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    tokenizer = evaluation.tokenizer
    return (
        f"{evaluation.verdict()}\n{capture.get()}"
        f"reconstruction of all frames {tokenizer.psnr:.2f} dB, best constant frame "
        f"{tokenizer.constant_frame_psnr:.2f} dB: {tokenizer.gain_db:+.2f} dB; {tokenizer.codes_used} of "
        f"{tokenizer.codebook_size} codes in use, perplexity {tokenizer.codebook_perplexity:.1f}"
    )
