import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

from stpredict.evaluation import report
from stpredict.evaluation.forecast_pictures import write_forecast_pictures
from stpredict.evaluation.forecast_scores import read_forecast_metrics
from stpredict.evaluation.forecasts import read_forecasts
from stpredict.evaluation.report import write_report
from stpredict.evaluation.results import read_evaluation
from stpredict.jobs import evaluate
from stpredict.jobs import report as job
from stpredict.jobs.config import EvaluateConfig, ReportConfig
from stpredict.run import Run
from tests.processes import succeeding
from tests.stpredict.evaluation.made_forecasts import field, hourly, video, write_forecasts


@pytest.fixture
def page(pipeline, tmp_path) -> str:
    return write_report("Moving squares", pipeline, tmp_path / "report.html").read_text()


def test_the_page_refers_to_nothing_outside_itself(page):
    references = _References()
    references.feed(page)
    assert len([r for r in references.found if r.startswith("data:image/gif;base64,")]) == 8
    assert all(r.startswith(("data:", "#")) for r in references.found)
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page
    assert "@import" not in page


def test_the_page_says_the_headline_numbers_the_precision_and_the_jobs(page, pipeline):
    evaluation = read_evaluation(pipeline["evaluate"] / "metrics.json")
    for part in (
        "Moving squares",
        evaluation.verdict(),
        f"{evaluation.prediction.psnr:.2f} dB",
        f"{evaluation.repeat_last_frame.psnr:.2f} dB",
        f"{evaluation.tokenizer.gain_db:+.2f} dB",
        f"<strong>{evaluation.tokenizer.codes_used}</strong> of 512 codes",
        "<dd>bf16</dd>",
        "node7",
        "51 s",  # of the tokenizer
        "2,000",  # samples
        "2 classes (run, walk)",
        "token grid 5 × 8 × 8",  # noqa: RUF001
        f"stpredict train {pipeline['prior']}/config.yaml",
        "learning rate",
        "41.0 samples/s, MFU 40%, 2.0% of the time waiting for data, at most 1.50 GB per rank",
        "2 unreadable samples replaced, 1 steps skipped",
    ):
        assert part in page, part
    assert "Missing from this page" not in page


def test_names_from_outside_are_escaped(pipeline, tmp_path):
    evil = "<script>alert(1)</script>"
    (pipeline["generate"] / "samples" / "000_clip-0.gif").rename(pipeline["generate"] / "samples" / "000_<b>x.gif")
    Run(pipeline["prior"]).update_status(state="failed", error=evil)
    Run(pipeline["prior"]).write_config(f"note: {evil}")
    page = write_report(evil, {**pipeline, evil: tmp_path / "nowhere"}, tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<b>x" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_what_failed_did_not_finish_or_is_not_there_is_named_and_the_rest_is_shown(pipeline, tmp_path):
    Run(pipeline["prior"]).update_status(state="failed", error="loss nan at step 12")
    Run(pipeline["prior"]).metrics_path.unlink()
    Run(pipeline["encode"]).update_status(state="running", step=7, steps=9)
    Run(pipeline["tokenizer"]).update_status(state="preempted", error="stopped at step 200 of 300")
    (pipeline["shard"] / "val" / "manifest.json").write_text("{")
    runs = {name: path for name, path in pipeline.items() if name != "evaluate"}
    page = write_report("x", {**runs, "sample": tmp_path / "nowhere"}, tmp_path / "report.html").read_text()
    for part in (
        "failed: loss nan at step 12",
        "no metrics in",
        "step 7 of 9",
        "stopped early, and can be continued: stopped at step 200 of 300",
        "<strong>sample</strong>: not run",
        "<strong>measurements</strong>: no evaluate run",
        "not a manifest of format 2",
    ):
        assert part in page, part
    assert page.count("<img") == 8
    assert page.count("<svg") == 1  # the tokenizer's curves


def test_damaged_small_files_do_not_stop_the_page(pipeline, tmp_path):
    for path in (
        pipeline["shard"] / "status.json",
        pipeline["encode"] / "config.yaml",
        pipeline["prior"] / "environment.json",
        pipeline["generate"] / "samples" / "index.json",
        pipeline["evaluate"] / "metrics.json",
        pipeline["tokenizer"] / "checkpoints" / "step_00000300" / "state.json",
    ):
        path.write_text("{[\n")
    (pipeline["tokenizer"] / "metrics.jsonl").write_text("{[\n")
    page = write_report("x", pipeline, tmp_path / "report.html").read_text()
    for name in pipeline:
        assert re.search(rf"<strong>{name}</strong>: .*(damaged|not run)", page), name


def test_no_runs_at_all_is_still_a_page(tmp_path):
    page = write_report("x", {"a": tmp_path / "a"}, tmp_path / "report.html").read_text()
    assert "no generate, reconstruct or forecast run" in page
    assert "no training run" in page
    assert "unknown (no checkpoint among these runs)" in page


def test_different_precisions_are_told_apart(pipeline, tmp_path):
    (pipeline["prior"] / "checkpoints" / "step_00000300" / "state.json").write_text('{"precision": "fp32"}')
    page = write_report("x", pipeline, tmp_path / "report.html").read_text()
    assert "tokenizer bf16, prior fp32" in page


def test_pictures_beyond_the_pages_size_are_counted(pipeline, tmp_path, monkeypatch):
    first = sorted((pipeline["generate"] / "samples").glob("*.gif"))[:3]
    monkeypatch.setattr(report, "PICTURE_BYTES", sum(path.stat().st_size for path in first))
    page = write_report("x", pipeline, tmp_path / "report.html").read_text()
    assert page.count("<img") == 3
    assert "5 more in" in page


def test_the_job_writes_the_page_into_its_run(pipeline, tmp_path):
    config = ReportConfig(run=tmp_path / "report", runs=pipeline)
    job.run(config, Run(config.run))
    assert "stpredict report" in (tmp_path / "report" / "report.html").read_text()


def test_writing_a_report_needs_no_torch():
    check = "import sys, stpredict.jobs.report; assert 'torch' not in sys.modules"
    succeeding([sys.executable, "-c", check])


class _References(HTMLParser):
    """Values of every attribute that makes a browser fetch something, outside <style> and text."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.found += [value for name, value in attributes if name in names]


@pytest.fixture
def forecast_runs(tmp_path) -> dict[str, Path]:
    """A forecast of a field and one of video, with pictures, and the evaluation of each."""
    runs = {}
    for name, made, about in (
        ("field", field(channels=2), {"units": ["K", "m"], "channels": ["t2m", "<b>z"], **hourly(5)}),
        ("video", video(), {"seconds_per_sample": 0.0123}),
    ):
        run = write_forecasts(tmp_path / f"{name} forecast", *made, **about)
        write_forecast_pictures(run.samples, read_forecasts(run).index, *made, count=2)
        judged = Run(tmp_path / f"{name} evaluate")
        judged.update_status(kind="evaluate", state="done")
        evaluate.run(EvaluateConfig(run=judged.path, generated=run.path), judged)
        runs |= {f"{name} forecast": run.path, f"{name} evaluate": judged.path}
    return runs


def test_the_page_shows_forecasts_their_table_their_curves_and_their_maps(forecast_runs, tmp_path):
    page = write_report("Forecasts", forecast_runs, tmp_path / "report.html").read_text()
    references = _References()
    references.feed(page)
    assert all(r.startswith(("data:", "#")) for r in references.found)
    assert len([r for r in references.found if r.startswith("data:image/gif;base64,")]) == 2  # video: they move
    assert len([r for r in references.found if r.startswith("data:image/png;base64,")]) >= 3  # field, and its maps
    assert page.count("lead time (h)") >= 2  # a row of curves for each channel
    assert "predicted frame" in page
    for name in ("field", "video"):
        found = read_forecast_metrics(forecast_runs[f"{name} evaluate"] / "metrics.json")
        for part in (found.verdict(), *found.notes, f"<td>{found.lead_names[-1]}</td>"):
            assert str(escape(part)).replace("&lt;td&gt;", "<td>").replace("&lt;/td&gt;", "</td>") in page
        for channel in [None] + (found.channels if name == "field" else []):
            for metric in found.shown_of(channel):
                assert f'<td class="number">{found.of("persistence", channel)[metric].overall:.4g}</td>' in page
    assert "12.3 ms per sample" in page
    assert "RMSE (m)" in page
    assert page.count("Wrapped PSNR, which is wrong") == 1  # of video alone
    assert "<b>z" not in page
    assert "no generate" not in page
    assert "no evaluate" not in page


def test_forecasts_without_pictures_or_with_a_damaged_index_are_named(forecast_runs, tmp_path):
    for path in (forecast_runs["field forecast"] / "samples").glob("*.png"):
        path.unlink()
    (forecast_runs["video forecast"] / "samples" / "index.json").write_text("{")
    page = write_report("x", forecast_runs, tmp_path / "report.html").read_text()
    assert "no pictures in its samples" in page
    assert "index.json: damaged" in page
