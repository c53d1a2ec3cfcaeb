"""One self-contained HTML page about a set of runs: pictures that move, headline numbers, curves, configs.

The page says plainly what is missing, so it can be written at any time. Torch-free. Its look is report.html.j2's.
"""

import base64
import shlex
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from stpredict.evaluation.charts import as_svg, frame_chart, training_chart
from stpredict.evaluation.forecast_charts import lead_time_chart
from stpredict.evaluation.forecasts import ForecastIndex
from stpredict.evaluation.generated import Index
from stpredict.evaluation.page import render
from stpredict.evaluation.reconstructed import ReconstructedIndex
from stpredict.evaluation.run_facts import TRAINING, RunFacts, read_facts
from stpredict.jobs.start import command_of
from stpredict.run import write_atomically

MOST_PICTURES = 8
PICTURE_BYTES = 5 * 2**20  # of GIFs in one page; base64 makes a third more of them
# Of an evaluation of forecasts: what is shown beside its curves, where it is there.
FORECAST_PICTURES = {
    "error_maps": "Where the errors are",
    "quantizer": "What the quantizer does: weights, codes and latents",
    "feature_maps": "Latents before and after the quantizer",
}


def write_report(title: str, runs: dict[str, Path], out: Path) -> Path:
    """Writes the page about ``runs`` (name → run directory, in the order shown) to ``out`` and returns ``out``."""
    facts = [read_facts(name, Path(path)) for name, path in runs.items()]
    facts = [run for run in facts if run.kind != "report"]
    page = render(
        "report.html.j2",
        title=title,
        facts=facts,
        runs=facts,
        total_s=sum(run.wall_s or 0 for run in facts),
        pictures=_pictures(facts),
        evaluations=[(run, _svg(frame_chart(run.evaluation), run)) for run in facts if run.evaluation],
        forecasts=[_forecast(run) for run in facts if run.forecast],
        trainings=[_training(run) for run in facts if run.kind in TRAINING],
        data=[(run, split, manifest) for run in facts for split, manifest in run.manifests.items()],
        missing=_missing(facts),
        commands=[_command(run) for run in facts if run.config],
    )
    write_atomically(out, page)
    return out


def _pictures(facts: list[RunFacts]) -> list[dict[str, Any]]:
    """The first pictures of each generate, reconstruct or forecast run, as many as the page has room for."""
    groups, room = [], PICTURE_BYTES
    for run in facts:
        if run.index is None:
            continue
        paths, shown = _picture_files(run), []
        for path in paths[:MOST_PICTURES]:
            data = path.read_bytes()
            if len(data) > room:
                break
            room -= len(data)
            shown.append(
                {"key": path.stem.partition("_")[2] or path.stem, "uri": _data_uri(f"image/{path.suffix[1:]}", data)}
            )
        what = _pictured(run.index)
        groups.append({"run": run, "what": what, "shown": shown, "left_out": len(paths) - len(shown)})
    return groups


def _picture_files(run: RunFacts) -> list[Path]:
    """GIFs, or the PNGs of a field's forecasts, which are not played."""
    return sorted(run.run.samples.glob("*.gif")) or sorted(run.run.samples.glob("*.png"))


def _pictured(index: Index | ReconstructedIndex | ForecastIndex) -> str:
    if isinstance(index, ForecastIndex):
        if index.data == "frames":
            return f"Held-out clips, side by side: the truth, and the forecast after {index.input_frames} given frames."
        return (
            f"Held-out samples: the last of {index.input_frames} given frames, the truth that followed, the forecast, "
            "and its error."
        )
    if isinstance(index, ReconstructedIndex):
        return "Held-out clips, side by side: the truth, and the tokenizer's reconstruction of it."
    if not index.given_frames:
        return "Clips made from nothing, side by side; where the prior is told a class, a row for each."
    return (
        f"Held-out clips, side by side: the truth, the prediction (its first {index.given_frames} frames are given), "
        "and the tokenizer's reconstruction of the truth."
    )


def _forecast(run: RunFacts) -> dict[str, Any]:
    pictures = {
        title: _data_uri("image/png", path.read_bytes())
        for name, title in FORECAST_PICTURES.items()
        if (path := run.run.path / f"{name}.png").is_file()
    }
    return {"run": run, "e": run.forecast, "chart": _svg(lead_time_chart(run.forecast), run), "pictures": pictures}


def _training(run: RunFacts) -> dict[str, Any]:
    rows = [row for row in run.rows if row["split"] == "train"]
    waits = [row["data_wait_share"] for row in rows if "data_wait_share" in row]
    rates = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
    shares = [row["mfu"] for row in rows if "mfu" in row]
    memory = [row.get("gpu_reserved_gb", row.get("rss_gb", 0)) for row in rows]
    replaced, skipped = ((rows[-1].get(name, 0) if rows else 0) for name in ("samples_replaced", "steps_skipped"))
    facts = [
        f"step {rows[-1]['step']} of {run.status.steps or '?'}" if rows else "",
        run.precision or "",
        f"{median(rates):,.1f} samples/s" if rates else "",
        f"MFU {median(shares):.0%}" if shares else "",
        f"{median(waits):.1%} of the time waiting for data" if waits else "",
        f"at most {max(memory):.2f} GB per rank" if any(memory) else "",
        f"{replaced} unreadable samples replaced" if replaced else "",
        f"{skipped} steps skipped" if skipped else "",
    ]
    chart = _svg(training_chart(run.kind, run.rows), run) if run.rows else None
    return {"run": run, "facts": ", ".join(filter(None, facts)), "chart": chart}


def _missing(facts: list[RunFacts]) -> list[tuple[str, str]]:
    """(name, what is missing), one line each."""
    lines = [(run.name, problem) for run in facts for problem in run.problems]
    kinds = {run.kind for run in facts}
    if not kinds & {"generate", "reconstruct", "forecast"}:
        lines.append(("pictures", "no generate, reconstruct or forecast run among these"))
    if "evaluate" not in kinds:
        lines.append(("measurements", "no evaluate run among these"))
    if not kinds & set(TRAINING):
        lines.append(("training curves", "no training run among these"))
    return lines + [(run.name, "no pictures in its samples") for run in facts if run.index and not _picture_files(run)]


def _command(run: RunFacts) -> str:
    return f"stpredict {command_of(run.kind)} {shlex.quote(str(run.run.config_path))}"


def _svg(figure, run: RunFacts) -> Markup:
    return Markup(as_svg(figure, salt=run.name))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
