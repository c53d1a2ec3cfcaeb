import csv
import math
import sys

import pytest

from stpredict.jobs import study_report
from stpredict.run import Run
from stpredict.studies import charts
from stpredict.studies.report import write_study_report
from tests.processes import succeeding
from tests.stpredict.studies.made_up_study import (
    ALPHA,
    BETA,
    STEPS,
    TOKENS,
    config_of,
    loss_of,
    write_blocks,
    write_sizes,
    write_training,
    write_translators,
)

SIZES = {"small": 100_000, "middle": 400_000, "large": 1_600_000}


def rows_of(folder, table: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{table}.csv").open()))


def test_the_tables_hold_what_the_trainings_wrote(tmp_path):
    write_study_report(write_sizes(tmp_path, SIZES), tmp_path / "report")
    runs = {row["trial"]: row for row in rows_of(tmp_path / "report", "runs")}
    assert list(runs) == [f"{size}-seed{seed}" for size in SIZES for seed in (0, 1)]
    row = runs["large-seed1"]
    assert (row["size"], row["seed"], row["state"], row["why"]) == ("large", "seed1", "done", "")
    assert int(row["parameters"]) == SIZES["large"]
    assert int(row["tokens"]) == STEPS * TOKENS
    assert float(row["flops"]) == 6.0 * SIZES["large"] * STEPS * TOKENS
    assert float(row["loss"]) == pytest.approx(loss_of(SIZES["large"], STEPS * TOKENS) + 0.005)
    assert float(row["training_s"]) == STEPS * 0.5
    assert float(row["memory_gb"]) == pytest.approx(1.16)
    validations = rows_of(tmp_path / "report", "validations")
    assert len(validations) == 6 * 16
    first = validations[0]
    assert (first["trial"], int(first["step"]), int(first["tokens"])) == ("small-seed0", 25, 25 * TOKENS)
    assert float(first["loss"]) == pytest.approx(loss_of(SIZES["small"], 25 * TOKENS) - 0.005)


def test_the_page_says_what_was_found_and_what_ran(tmp_path):
    page = write_study_report(write_sizes(tmp_path, SIZES), tmp_path / "report").read_text()
    small, large = (loss_of(SIZES[size], STEPS * TOKENS) for size in ("small", "large"))
    assert f"cross_entropy {small:.4g} with small (100 k), {large:.4g} with large (1.6 M)" in page
    assert "The larger the model, the lower its loss" in page
    assert "seeds differ by 0.0071" in page  # 0.01 / sqrt(2)
    assert '<strong>6</strong> trials:\n<span class="done">6 done</span>' in page
    assert "the 6\njobs that started took 24 min 00 s together" in page
    assert "abc123abc123" in page
    assert "node7, 2 cores of A CPU" in page
    assert page.count("<svg") == len(list((tmp_path / "report").glob("*.png"))) >= 2
    assert "Not done" not in page
    assert "<script" not in page


def test_a_larger_model_that_is_worse_is_said_to_be(tmp_path):
    trials = {}
    for size, penalty in {"small": 0.0, "large": 2.0}.items():
        trials[f"{size}-seed0"] = {"size": size, "seed": "seed0"}
        write_training(tmp_path / f"{size}-seed0-prior", SIZES[size], penalty=penalty)
    config = config_of(tmp_path, {"size": "size", "seed": "seed"}, trials)
    page = write_study_report(config, tmp_path / "report").read_text()
    assert "The largest model does NOT have the lowest loss" in page
    assert "how much of it is chance is not known" in page


def test_what_failed_diverged_runs_or_did_not_begin_is_named_with_its_reason(tmp_path):
    kinds = {
        "fails": {"state": "failed", "until": 200, "error": "out of <b>memory</b>"},
        "diverges": {"diverges": 100},
        "runs": {"state": "running", "until": 100},
        "stops": {"state": "preempted", "until": 100, "error": "stopped at step 100"},
        "works": {},
    }
    for name, keys in kinds.items():
        write_training(tmp_path / f"{name}-prior", 100_000, **keys)
    config = config_of(tmp_path, {"size": "size"}, {name: {"size": name} for name in (*kinds, "waits")})
    page = write_study_report(config, tmp_path / "report").read_text()
    states = {row["trial"]: row["state"] for row in rows_of(tmp_path / "report", "runs")}
    assert states == {
        "fails": "failed",
        "diverges": "diverged",
        "runs": "running",
        "stops": "preempted",
        "works": "done",
        "waits": "not started",
    }
    assert "out of &lt;b&gt;memory&lt;/b&gt;" in page
    assert "<b>memory" not in page
    assert f"log: {tmp_path}/fails-prior/logs/rank_0.log" in page
    assert "its training loss ended at" in page
    assert "step 100 of 400" in page
    assert "stopped at step 100" in page
    assert '<span class="not">not started</span>: waits' in page
    assert f"stpredict resume {tmp_path}" in page
    assert "Only works" in page  # is done: nothing to compare it with


def test_a_study_of_which_nothing_has_run_is_a_page_too(tmp_path):
    config = config_of(tmp_path, {"size": "size"}, {"a": {"size": "a"}, "b": {"size": "b"}})
    page = write_study_report(config, tmp_path / "report").read_text()
    assert "No trial is done yet" in page
    assert "2 not started" in page
    assert "no validation yet" in page
    assert "No job of a trial\nhas started" in page
    assert rows_of(tmp_path / "report", "validations") == []


def test_a_line_half_written_and_lines_of_rubbish_are_left_out_and_said(tmp_path):
    config = write_sizes(tmp_path, {"small": 100_000, "large": 400_000}, seeds=1)
    path = Run(tmp_path / "small-seed0-prior").metrics_path
    lines = path.read_text().splitlines(keepends=True)
    path.write_bytes("".join(lines[:4]).encode() + b"\x00\xff{\n[1, 2]\n" + "".join(lines[4:]).encode() + b'{"step": 4')
    page = write_study_report(config, tmp_path / "report").read_text()
    assert f"2 lines of {path} are damaged and left out" in page
    assert len(rows_of(tmp_path / "report", "validations")) == 2 * 16


def test_damaged_small_files_do_not_stop_the_page(tmp_path):
    config = write_sizes(tmp_path, SIZES)
    for number, name in enumerate(("status.json", "scale.json", "config.yaml", "environment.json", "metrics.jsonl")):
        trial = list(config.trials)[number]
        (tmp_path / f"{trial}-prior" / name).write_text("{[\n")
    page = write_study_report(config, tmp_path / "report").read_text()
    assert page.count("damaged") >= 5


def test_trials_that_train_nothing_are_a_table(tmp_path):
    for name in ("a", "b"):
        run = Run(tmp_path / f"{name}-prior")
        run.path.mkdir()
        run.write_config("kind: shard\n")
        run.update_status(kind="shard", state="done")
    config = config_of(tmp_path, {"workers": "other"}, {"a": {"workers": "a"}, "b": {"workers": "b"}})
    page = write_study_report(config, tmp_path / "report").read_text()
    assert [row["state"] for row in rows_of(tmp_path / "report", "runs")] == ["done", "done"]
    assert "No trial is done yet" not in page


def test_the_job_writes_the_page_and_needs_no_torch(tmp_path):
    config = write_sizes(tmp_path, {"small": 100_000, "large": 400_000}, seeds=1)
    study_report.run(config, Run(config.run))
    assert (tmp_path / "report" / "report.html").is_file()
    code = "import sys, stpredict.jobs.study_report; assert 'torch' not in sys.modules"
    succeeding([sys.executable, "-c", code])


def test_charts_that_are_no_longer_so_are_removed_and_other_pictures_stay(tmp_path):
    config = write_sizes(tmp_path, SIZES)
    (tmp_path / "report").mkdir()
    for name in ("laws_7.png", "mine.png"):
        (tmp_path / "report" / name).write_bytes(b"x")
    write_study_report(config, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert names >= {"mine.png", "laws.png"}
    assert "laws_7.png" not in names


def test_the_law_that_made_the_losses_is_on_the_page_with_its_prediction(tmp_path):
    sizes = {f"s{number}": int(1e5 * 1.8**number) for number in range(5)}
    config = write_sizes(tmp_path, sizes, analysis={"points": "curve", "predict": [1e8], "bootstrap": 50})
    page = write_study_report(config, tmp_path / "report").read_text()
    fits = {(row["law"], row["constant"]): row for row in rows_of(tmp_path / "report", "fits")}
    assert float(fits["L(N, D)", "alpha"]["value"]) == pytest.approx(ALPHA, rel=0.02)
    assert float(fits["L(N, D)", "beta"]["value"]) == pytest.approx(BETA, rel=0.02)
    predicted = next(row for row in rows_of(tmp_path / "report", "predictions") if row["law"] == "L(N, D)")
    truth = loss_of(1e8, STEPS * TOKENS)
    assert float(predicted["loss"]) == pytest.approx(truth, rel=0.01)
    assert predicted["extrapolation"] == "True"
    for part in ("extrapolation</strong>", "100 M", f"{float(predicted['factor']):.3g}", "L(N, D)", "joint_law.png"):
        assert part in page, part
    assert len(page) < 3e6


def test_curves_that_no_three_sizes_have_at_one_c_are_no_frontier(tmp_path):
    sizes = {f"s{number}": int(1e5 * 16.0**number) for number in range(4)}
    config = write_sizes(tmp_path, sizes, analysis={"points": "curve", "bootstrap": 0})
    page = write_study_report(config, tmp_path / "report").read_text()
    assert "there are no three sizes whose curves overlap in C" in page


def test_learning_rates_have_their_best_marked_and_its_edge_said(tmp_path):
    trials = {}
    for size, edge in {"small": 0.01, "large": 0.001}.items():
        for lr in (0.0001, 0.001, 0.01):
            name = f"{size}-lr{lr:g}"
            trials[name] = {"size": size, "lr": f"lr{lr:g}"}
            write_training(tmp_path / f"{name}-prior", SIZES[size], lr, penalty=0.1 * abs(math.log10(lr / edge)))
    config = config_of(tmp_path, {"size": "size", "lr": "lr"}, trials)
    page = write_study_report(config, tmp_path / "report").read_text()
    rows = rows_of(tmp_path / "report", "learning_rates")
    best = {row["size"]: (float(row["learning_rate"]), row["at_edge"]) for row in rows if row["best"] == "True"}
    assert best == {"small": (0.01, "True"), "large": (0.001, "False")}
    assert page.count("at the edge of the grid: the best may lie beyond") == 1
    small, large = (f"{loss_of(SIZES[size], STEPS * TOKENS):.4g} with {size}" for size in SIZES if size != "middle")
    assert small in page  # at the best learning rate
    assert large in page


def test_blocks_are_compared_by_loss_quality_and_speed(tmp_path):
    config = write_blocks(tmp_path, {"block1x1x16": 5.0, "block1x1x4": 20.0, "block1x1x1": 80.0})
    page = write_study_report(config, tmp_path / "report").read_text()
    rows = rows_of(tmp_path / "report", "comparisons")
    assert [row["value"] for row in rows] == ["block1x1x1", "block1x1x4", "block1x1x16"]
    first = rows[0]
    assert (first["axis"], int(first["trials"])) == ("block", 2)
    assert float(first["loss"]) == pytest.approx(loss_of(100_000, STEPS * TOKENS))
    assert float(first["loss_sd"]) == pytest.approx(0.2 / math.sqrt(2))
    assert float(first["psnr"]) == pytest.approx(21)
    assert float(first["frames_per_s"]) == pytest.approx(240 / 80)
    runs = rows_of(tmp_path / "report", "runs")
    assert [int(row["block_tokens"]) for row in runs] == [16, 16, 4, 4, 1, 1]
    assert {"by_block.png", "quality_and_speed_by_block.png"} <= {p.name for p in (tmp_path / "report").iterdir()}
    for part in ("By block", "block (tokens)", "repeat last frame", "+1.00"):
        assert part in page, part


def test_forecasts_are_compared_as_papers_print_them_beside_their_yardsticks(tmp_path):
    config = write_translators(tmp_path, {"gsta": 1.5, "incepu": 2.5})
    page = write_study_report(config, tmp_path / "report").read_text()
    first, second = rows_of(tmp_path / "report", "comparisons")
    assert (first["value"], second["value"]) == ("gsta", "incepu")
    assert float(first["forecast_rmse"]) == pytest.approx(1.5)
    assert float(second["forecast_mae"]) == pytest.approx(1.25)
    assert float(first["forecast_rmse_sd"]) == pytest.approx(0.2 / math.sqrt(2))
    assert first["forecast_ssim"] == first["psnr"] == ""
    runs = {row["trial"]: row for row in rows_of(tmp_path / "report", "runs")}
    assert float(runs["incepu-seed1"]["forecast_rmse"]) == pytest.approx(2.6)
    for part in (
        "By translator",
        "RMSE (K) of forecasts",  # of the chart
        *(f'<tr><td>{name}</td><td class="number">{n}</td>' for name, n in (("gsta", 2), ("persistence", 4))),
        '<td class="number">0.75 ± 0.071</td><td class="number">1.5 ± 0.14</td></tr>',
        '<td class="number">1.5</td><td class="number">3</td></tr>',
        "<tr><td>climatology</td>",
    ):
        assert part in page, part
    for absent in ("Not fitted", "Fits", "not known"):  # they see no tokens, in which laws are
        assert absent not in page, absent


def test_the_chart_of_forecasts_has_the_levels_of_their_yardsticks(tmp_path, monkeypatch):
    levels = []
    monkeypatch.setattr(charts, "level_line", lambda panel, name, level: levels.append((name, level)))
    write_study_report(write_translators(tmp_path, {"gsta": 1.5, "incepu": 2.5}), tmp_path / "report")
    assert levels == [("persistence", 3), ("climatology", 2), ("persistence", 1.5), ("climatology", 1)]  # RMSE, MAE


def test_labels_and_titles_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    write_training(tmp_path / "a-prior", 100_000)
    config = config_of(tmp_path, {"config": "other", "size": "size"}, {"a": {"config": evil, "size": evil}})
    page = write_study_report(config.model_copy(update={"title": evil}), tmp_path / "report").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3


def test_many_trials_stay_one_small_page(tmp_path):
    config = write_sizes(tmp_path, {f"s{n}": int(1e5 * 1.3**n) for n in range(12)}, seeds=8, analysis={"bootstrap": 0})
    assert len(write_study_report(config, tmp_path / "report").read_text()) < 3e6
