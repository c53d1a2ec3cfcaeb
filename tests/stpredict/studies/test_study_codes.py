"""The use of codes that evaluations of forecasts measured, in the tables and on the page of their study."""

import csv
import math

import pytest

from stpredict.evaluation.quantizer_results import Activity, CodeUse, Distribution, QuantizerAnalysis
from stpredict.studies.report import write_study_report
from tests.stpredict.studies.made_up_study import write_forecasters, write_translators


def distribution(kurtosis: float) -> Distribution:
    return Distribution(rows=9, columns=8, mean=0, sd=1, kurtosis=kurtosis, zeros=0, edges=[0, 1], density=[1])


def write_analysis(folder, trial: str, kind: str, **found) -> None:
    same = {"place": "before", "samples": 4, "locations": 9, "before": distribution(0), "after": distribution(0)}
    analysis = QuantizerAnalysis(quantizer=kind, codebook_size=128, **same, **found)
    (folder / f"{trial}-evaluation" / "quantizer.json").write_text(analysis.model_dump_json())


def of_svq(seed: int) -> dict:
    """Perplexities 100 and 102 at 2 sd, half of that at 3; kurtosis 5 of weights, 1 of the codebook."""
    perplexity = 100 + 2 * seed
    shares = [Activity(threshold=at, perplexity=perplexity * of, share=0.1, codes=120) for at, of in ((2, 1), (3, 0.5))]
    return {"activity": shares, "weights": distribution(5), "codebook": distribution(1)}


def of_residual_vq(seed: int) -> dict:
    """Two stages, 20 and 40 of 128 codes; half and a quarter of them used."""
    return {"uses": [CodeUse(perplexity=20, used_share=0.5), CodeUse(perplexity=40, used_share=0.25)]}


def write_study(folder):
    cells = {(name, loss): 1.5 for name in ("without", "svq", "residual_vq") for loss in ("mse", "mae")}
    config = write_forecasters(folder, ["quantizer", "loss"], cells, [-0.1, 0.1])
    for loss in ("mse", "mae"):
        for seed in (0, 1):
            write_analysis(folder, f"svq-{loss}-seed{seed}", "svq", **of_svq(seed))
            write_analysis(folder, f"residual_vq-{loss}-seed{seed}", "residual_vq", **of_residual_vq(seed))
    return config


def rows_of(folder, table: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{table}.csv").open()))


def cells_with(*values: str) -> str:
    return "".join(f'<td class="number">{value}</td>' for value in values)


def test_the_use_of_codes_is_in_the_tables_with_its_deviation_over_seeds(tmp_path):
    write_study_report(write_study(tmp_path), tmp_path / "report")
    runs = {row["trial"]: row for row in rows_of(tmp_path / "report", "runs")}
    one = runs["svq-mae-seed1"]
    names = ("codes", "code_perplexity_2sd", "code_perplexity_3sd", "kurtosis_weights", "kurtosis_codebook")
    assert [float(one[name]) for name in names] == [128, 102, 51, 5, 1]
    assert [one["code_perplexity"], one["codes_used"], runs["without-mse-seed0"]["codes"]] == ["", "", ""]
    cells = {(row["quantizer"], row["axis_loss"]): row for row in rows_of(tmp_path / "report", "cells")}
    assert float(cells["svq", "mse"]["code_perplexity_2sd"]) == pytest.approx(101)
    assert float(cells["svq", "mse"]["code_perplexity_2sd_sd"]) == pytest.approx(math.sqrt(2))
    assert float(cells["residual_vq", "mse"]["code_perplexity"]) == pytest.approx(30)  # mean of its stages
    assert float(cells["residual_vq", "mse"]["codes_used"]) == pytest.approx(0.375)


def test_the_page_has_a_row_for_each_cell_with_a_quantizer(tmp_path):
    page = write_study_report(write_study(tmp_path), tmp_path / "report").read_text()
    everything, _, codes = page.partition("<h2>Every cell</h2>")[2].partition("<h2>Use of codes</h2>")
    codes, dash = codes.partition("</section>")[0], "\N{EN DASH}"
    titles = ("codes", "perplexity", "share used", "perplexity, 2 sd", "perplexity, 3 sd", "kurtosis of weights")
    assert "".join(f'<th class="number">{title}</th>' for title in titles) in codes
    svq = cells_with("2", "128", dash, dash, "101 ± 1.4", "50.5 ± 0.71", "5", "1")
    assert f"<tr><td>svq</td><td>mae</td>{svq}</tr>" in codes
    residual = cells_with("2", "128", "30", "0.375", dash, dash, dash, dash)
    assert f"<tr><td>residual_vq</td><td>mse</td>{residual}</tr>" in codes
    assert codes.count("<tr><td>") == 4
    assert "without" not in codes
    assert "kurtosis" not in everything


def test_with_one_axis_the_use_of_codes_is_a_table_too(tmp_path):
    config = write_translators(tmp_path, {"svq": 1.5, "without": 2.5})
    for seed in (0, 1):
        write_analysis(tmp_path, f"svq-seed{seed}", "svq", **of_svq(seed))
    page = write_study_report(config, tmp_path / "report").read_text()
    assert f"<tr><td>svq</td>{cells_with('2', '128', '101 ± 1.4', '50.5 ± 0.71', '5', '1')}</tr>" in page


def test_a_damaged_analysis_of_a_quantizer_is_said_and_the_page_is_there(tmp_path):
    config = write_translators(tmp_path, {"svq": 1.5, "without": 2.5})
    path = tmp_path / "svq-seed0-evaluation" / "quantizer.json"
    path.write_text("{[")
    page = write_study_report(config, tmp_path / "report").read_text()
    assert f"evaluation: {path}: damaged; run the evaluate job again" in page
    assert "Use of codes" not in page
