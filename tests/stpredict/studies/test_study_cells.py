"""Every cell of a study by itself, however many axes it compares: means and deviations over seeds alone."""

import csv
import math
from itertools import product

import pytest

from stpredict.run import Run
from stpredict.studies import cell_charts
from stpredict.studies.report import write_study_report
from tests.stpredict.studies.made_up_study import (
    STEPS,
    TOKENS,
    config_of,
    loss_of,
    write_blocks,
    write_forecasters,
    write_training,
    write_translators,
)

AXES = ["translator", "quantizer", "loss"]
CELLS = list(product(("gsta", "swin"), ("without", "svq"), ("mse", "mae")))
RMSE = {cell: 1 + 0.1 * number for number, cell in enumerate(CELLS)}


def cells_of(folder) -> list[dict[str, str]]:
    return rows_of(folder, "cells")


def rows_of(folder, table: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{table}.csv").open()))


def row_of(*labels: str, trials: str) -> str:
    return "".join(["<tr>", *(f"<td>{label}</td>" for label in labels), f'<td class="number">{trials}</td>'])


def test_each_cell_has_the_mean_and_deviation_of_its_seeds(tmp_path):
    """Two seeds 0.2 K apart are ± 0.2 / sqrt(2), whatever lies between the cells."""
    page = write_study_report(write_forecasters(tmp_path, AXES, RMSE, [-0.1, 0.1]), tmp_path / "report").read_text()
    *rows, persistence, climatology = cells_of(tmp_path / "report")
    assert [(row["translator"], row["quantizer"], row["axis_loss"]) for row in rows] == CELLS
    for row, middle in zip(rows, RMSE.values(), strict=True):
        assert [row[name] for name in ("method", "planned", "trials", "evaluated")] == ["prediction", "2", "2", "2"]
        assert float(row["forecast_rmse"]) == pytest.approx(middle)
        assert float(row["forecast_rmse_sd"]) == pytest.approx(0.2 / math.sqrt(2))
        assert float(row["forecast_mae"]) == pytest.approx(middle / 2)
        assert float(row["forecast_mae_sd"]) == pytest.approx(0.1 / math.sqrt(2))
        assert float(row["loss"]) == pytest.approx(loss_of(100_000, STEPS * TOKENS))
        assert float(row["loss_sd"]) == pytest.approx(0.02 / math.sqrt(2))
    assert (persistence["method"], float(persistence["forecast_rmse"])) == ("persistence", 3)
    assert (climatology["method"], float(climatology["forecast_mae"])) == ("climatology", 1)
    assert persistence["translator"] == persistence["axis_loss"] == ""
    assert (
        f'{row_of("swin", "svq", "mse", trials="2")}<td class="number">3.306 ± 0.014</td>'
        '<td class="number">0.8 ± 0.071</td><td class="number">1.6 ± 0.14</td></tr>'
    ) in page
    assert '<td colspan="3">persistence</td><td class="number">16</td><td class="number">\N{EN DASH}</td>' in page
    assert float(rows_of(tmp_path / "report", "runs")[0]["loss"]) == pytest.approx(
        loss_of(100_000, STEPS * TOKENS) - 0.01
    )
    assert "cells.png" in page
    assert (tmp_path / "report" / "cells.png").is_file()


def test_what_a_table_of_one_axis_averages_over_is_said(tmp_path):
    page = write_study_report(write_forecasters(tmp_path, AXES, RMSE, [-0.1, 0.1]), tmp_path / "report").read_text()
    _, translator, quantizer, loss = page.partition("<h2>Every cell</h2>")[0].split("<h2>By ")
    assert "deviation between them, which differ in quantizer, loss, seed;" in translator
    assert "deviation between them, which differ in loss, seed;" in quantizer
    assert "deviation between them, which differ in quantizer, seed;" in loss


def test_with_one_axis_beside_the_seed_there_are_no_cells_on_the_page(tmp_path):
    page = write_study_report(write_translators(tmp_path, {"gsta": 1.5, "swin": 2.5}), tmp_path / "report").read_text()
    assert "Every cell" not in page
    assert not (tmp_path / "report" / "cells.png").exists()
    assert [row["translator"] for row in cells_of(tmp_path / "report")] == ["gsta", "swin", "", ""]
    assert "deviation between them, which differ in seed;" in page


def test_cells_that_are_not_done_say_how_far_they_are(tmp_path):
    """Unlike a comparison, which takes what has its like: a cell stands by itself."""
    config = write_forecasters(tmp_path, AXES, RMSE, [-0.1, 0.1])
    Run(tmp_path / "gsta-svq-mae-seed1-prior").update_status(state="running")
    (tmp_path / "swin-svq-mse-seed0-evaluation" / "metrics.json").unlink()
    for seed in (0, 1):
        (tmp_path / f"swin-svq-mae-seed{seed}-prior" / "status.json").unlink()
    page = write_study_report(config, tmp_path / "report").read_text()
    half, unevaluated, missing = cells_of(tmp_path / "report")[3], *cells_of(tmp_path / "report")[6:8]
    assert [half["planned"], half["trials"], half["forecast_rmse_sd"]] == ["2", "1", ""]
    assert float(half["forecast_rmse"]) == pytest.approx(1.2)  # 1.3 - 0.1
    assert [unevaluated["trials"], unevaluated["evaluated"]] == ["2", "1"]
    assert float(unevaluated["forecast_rmse"]) == pytest.approx(1.7)
    assert [missing["trials"], missing["loss"]] == ["0", ""]
    assert row_of("gsta", "svq", "mae", trials="1 of 2") in page
    assert row_of("swin", "svq", "mse", trials="2, 1 evaluated") in page
    assert row_of("swin", "svq", "mae", trials="0 of 2") in page


def test_frames_are_measured_beside_repeating_and_reconstruction(tmp_path):
    config = write_blocks(tmp_path, {"block1x1x4": 20.0, "block1x1x1": 80.0})
    write_study_report(config, tmp_path / "report")
    rows = cells_of(tmp_path / "report")
    assert [(row["method"], row["block"], float(row["psnr"])) for row in rows] == [
        ("prediction", "block1x1x1", 21),
        ("prediction", "block1x1x4", 21),
        ("repeat last frame", "", 20),
        ("reconstruction", "", 26),
    ]
    assert float(rows[0]["frames_per_s"]) == pytest.approx(240 / 80)


def test_sizes_and_learning_rates_are_cells_too_in_their_order(tmp_path):
    trials = {}
    for size, lr, seed in product(("large", "small"), ("lr1e-2", "lr1e-3"), ("seed0", "seed1")):
        trials[f"{size}-{lr}-{seed}"] = {"size": size, "lr": lr, "seed": seed}
        write_training(tmp_path / f"{size}-{lr}-{seed}-prior", {"small": 100_000, "large": 400_000}[size])
    config = config_of(tmp_path, {"size": "size", "lr": "lr", "seed": "seed"}, trials)
    page = write_study_report(config, tmp_path / "report").read_text()
    places = [(row["size"], row["lr"]) for row in cells_of(tmp_path / "report")]
    assert places == list(product(("small", "large"), ("lr1e-3", "lr1e-2")))
    assert row_of("small", "lr1e-3", trials="2") in page


def test_the_chart_has_a_dot_for_each_seed_and_the_cells_side_by_side(tmp_path, monkeypatch):
    dots, charts = [], []
    monkeypatch.setattr(cell_charts, "_dots", lambda panel, x, values, colour: dots.append((x, len(values), colour)))
    original = cell_charts.cell_chart
    monkeypatch.setattr(cell_charts, "cell_chart", lambda *args: charts.append(original(*args)) or charts[-1])
    write_study_report(write_forecasters(tmp_path, AXES, RMSE, [-0.1, 0, 0.1]), tmp_path / "report")
    loss, rmse, mae = dots[:8], dots[8:16], dots[16:]
    assert loss == rmse == mae
    assert [x for x, _, _ in loss] == [0, 1, 3, 4, 6, 7, 9, 10]  # groups: quantizer and loss; in each, the translators
    assert {n for _, n, _ in loss} == {3}
    gsta, swin = ({colour for _, _, colour in loss[at::2]} for at in (0, 1))
    assert len(gsta) == len(swin) == 1
    assert gsta != swin
    assert [tick.get_text() for tick in charts[0].axes[-1].get_xticklabels()] == ["gsta", "swin"] * 4


def test_the_table_of_more_cells_than_a_chart_can_tell_apart_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_charts, "MOST", 7)
    page = write_study_report(write_forecasters(tmp_path, AXES, RMSE, [0]), tmp_path / "report").read_text()
    assert not (tmp_path / "report" / "cells.png").exists()
    assert row_of("swin", "svq", "mae", trials="1") in page
