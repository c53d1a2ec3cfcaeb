"""Grids with holes, runs without tokens, sizes far apart: no number is made of what cannot be compared."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_study import AXES, CURVE, TOKENS, loss_of, sizes, study, trial

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.run import Run
from stpredict.studies.analyse import analyse
from stpredict.studies.compare import chosen_of, comparison_of
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.headline import headline
from stpredict.studies.look import look_of
from stpredict.studies.report import write_study_report
from stpredict.studies.tables import tables_of
from tests.stpredict.studies.made_up_study import config_of, write_sizes, write_training

CURVES = AnalysisConfig(points="curve", bootstrap=0)
SIZES = sizes(5)


def test_amounts_of_compute_that_no_size_came_to_are_no_part_of_the_frontier():
    small, large = ([1e4, 1.5e4, 2e4], [1e8, 1.5e8, 2e8])
    (group,) = analyse(study(small + large, 1, 0.001, CURVE), AXES, CURVES).groups
    assert group.frontier
    for point in group.frontier:
        steps = {n: point.flops / (6 * n * TOKENS) for n in small + large}
        assert any(CURVE[0] <= step <= CURVE[-1] * (1 + 1e-6) for step in steps.values())


def test_a_run_without_tokens_is_left_out_and_named():
    trials = study(SIZES, 2, 0.002)
    trials[0].scale = trials[0].scale.model_copy(update={"tokens_per_step": 0})
    trials[1].steps = [0]
    (group,) = analyse(trials, AXES, AnalysisConfig(bootstrap=0)).groups
    assert {one.trial: one.why for one in group.left_out} == {
        trials[0].name: "no tokens are counted up to its last validation, at step 2000",
        trials[1].name: "no tokens are counted up to its last validation, at step 0",
    }
    assert len(group.find("L(N)")[0].points) == 8


def test_intervals_are_called_what_was_asked_for():
    trials = study(SIZES, 3, 0.002, CURVE)
    laws = analyse(trials, AXES, AnalysisConfig(points="curve", bootstrap=400, confidence=0.995)).groups[0].laws
    assert {law.name for law in laws} >= {"L(N)", "L(C)", "N_opt(C)"}
    assert all(law.interval.startswith(("99.5%; ", "none: ")) for law in laws)
    assert sum(law.interval.startswith("99.5%") for law in laws) > 3


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"metric": "psnr"}, "metric psnr: laws take what is less the better"),
        ({"bootstrap": 39}, "bootstrap 39: so few draws have no 95% interval; give 40 or more, or 0 for none"),
        ({"bootstrap": 100, "confidence": 0.99}, "have no 99% interval; give 200 or more"),
    ],
)
def test_an_analysis_that_would_mislead_is_refused(keys, says):
    with pytest.raises(UsageError, match=says):
        validate(AnalysisConfig, keys, "study.yaml")
    AnalysisConfig(bootstrap=40)
    AnalysisConfig(bootstrap=0, confidence=0.999)


def test_an_optimum_of_larger_models_than_were_trained_is_an_extrapolation():
    """The sizes are so small that at every C the best is a larger one."""
    (group,) = analyse(study([1e3, 2e3, 4e3, 8e3], 1, 0, CURVE), AXES, CURVES).groups
    law = next(law for law in group.laws if (law.name, law.of) == ("N_opt(C)", "joint law"))
    beyond = [point for point in law.curve if point.fitted.value > 8.001e3]
    assert len(beyond) > 10
    assert all(point.extrapolation for point in beyond)
    law = next(law for law in group.laws if (law.name, law.of) == ("D_opt(C)", "joint law"))
    assert [point.extrapolation for point in law.curve].count(True) >= len(beyond)
    early = CURVES.model_copy(update={"curve_from": 0.01})  # the optimum of these sizes has few tokens
    (group,) = analyse(study(SIZES, 1, 0, CURVE), AXES, early).groups
    assert not all(point.extrapolation for law in group.find("N_opt(C)") for point in law.curve)


def said(trials, axes):
    look = look_of(trials, axes)
    chosen = {one.trial: one.best_lr for group in analyse(trials, axes, CURVES).groups for one in group.used}
    return headline(trials, axes, look, chosen)


def of_lengths(lengths):
    """N → steps of its runs."""
    return [
        trial(f"{n:g}-{steps}", n, [steps], [loss_of(n, steps * TOKENS)], at={"data": str(steps)})
        for n, several in lengths.items()
        for steps in several
    ]


def test_sizes_are_compared_where_all_of_them_are_done():
    """A large model that has only short runs is not worse for it."""
    axes = {"size": "size", "data": "data"}
    words, good = said(of_lengths({1e5: (100, 4000), 4e5: (100,)}), axes)
    assert good
    assert f"cross_entropy {loss_of(1e5, 100 * TOKENS):.4g} with" in words
    words, good = said(of_lengths({1e5: (4000,), 4e5: (100,)}), axes)
    assert good is None
    assert words == "The values of size that are done differ in other axes too: they are not compared."


def test_the_noise_of_seeds_is_that_of_their_pooled_variance():
    """sqrt((1 x 0.02 + 3 x 0.0004) / 4) of two runs 0.2 apart and four whose variance is 0.0004."""
    losses = {1e5: (3.9, 4.1), 4e5: (3 + 0.02 * np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5 / 3)).tolist()}
    trials = [
        trial(f"{n}-{seed}", n, [100], [loss], at={"seed": str(seed)})
        for n, several in losses.items()
        for seed, loss in enumerate(several)
    ]
    assert "seeds differ by 0.073)" in said(trials, AXES)[0]
    alone = [one for one in trials if one.at["seed"] == "0"]
    assert "how much of it is chance is not known" in said(alone, AXES)[0]
    for one in trials:  # others than seeds make no noise
        one.at = {"size": one.at["size"], "data": one.at["seed"]}
    assert "is not known" in said([one for one in trials if one.at["data"] < "2"], {"size": "size", "data": "data"})[0]


def test_values_are_compared_at_places_that_all_of_them_have():
    """A block that has only the large model is not better for it."""
    axes = {"size": "size", "block": "other", "mask": "other", "seed": "seed"}
    loss = {"small": 4.0, "large": 3.0, "a": 0.0, "b": 0.5, "full": 0.0, "half": 1.0}
    there = [("small", "a", "full"), ("small", "b", "full"), ("small", "b", "half"), ("large", "a", "half")]
    trials = [
        trial("-".join(at), 1e5, [9], [sum(loss[one] for one in at)], at=dict(zip(axes, at, strict=False)))
        for at in there
    ]
    look = look_of(trials, axes)
    found = comparison_of("block", trials, axes, look, {})
    assert [(c.label, c.colour, [t.name for t in c.trials]) for c in found.cells if c.colour == "small"] == [
        ("a", "small", ["small-a-full"]),
        ("b", "small", ["small-b-full"]),
    ]
    assert found.left_out == ["small-b-half"]
    table = tables_of(trials, axes, analyse(trials, axes, CURVES), look, {})["comparisons"]
    losses = {tuple(row[:3]): row[4] for row in table.rows}
    assert losses["block", "b", "small"] - losses["block", "a", "small"] == 0.5
    assert losses["mask", "half", "small"] - losses["mask", "full", "small"] == 1.0
    trials = [trial(name, 1e5, [9], [3.0], at={"block": name[0], "mask": name[1]}) for name in ("ax", "by")]
    found = comparison_of("block", trials, axes, look_of(trials, axes), {})
    assert (found.cells, found.left_out) == ([], ["ax", "by"])


def test_values_are_compared_at_their_best_learning_rate():
    axes = {"block": "other", "lr": "lr"}
    trials = [
        trial(f"{block}-{lr}", 1e5, [9], [loss], at={"block": block, "lr": lr}, learning_rate=float(lr))
        for block, losses in (("a", (3.0, 9.0)), ("b", (9.0, 4.0)))
        for lr, loss in zip(("1e-3", "1e-2"), losses, strict=True)
    ]
    chosen = chosen_of(analyse(trials, axes, CURVES))
    cells = comparison_of("block", trials, axes, look_of(trials, axes), chosen).cells
    assert {cell.label: [one.name for one in cell.trials] for cell in cells} == {"a": ["a-1e-3"], "b": ["b-1e-2"]}


def test_the_page_names_what_it_does_not_compare(tmp_path):
    places = {"ax": "a x", "bx": "b x", "by": "b y"}
    axes = {"block": "other", "mask": "other"}
    for name in places:
        write_training(tmp_path / f"{name}-prior", 100_000)
    trials = {name: dict(zip(axes, place.split(), strict=True)) for name, place in places.items()}
    page = write_study_report(config_of(tmp_path, axes, trials), tmp_path / "report").read_text()
    assert "since not every value of block has a trial like them: by</p>" in page
    assert page.count("Not compared") == 1


def test_learning_rates_of_one_size_are_compared():
    trials = [
        trial(f"{lr}", 1e5, [100], [2 + 0.1 * abs(np.log10(lr / 1e-3))], learning_rate=lr, at={"lr": f"lr{lr}"})
        for lr in (1e-4, 1e-3, 1e-2)
    ]
    words, _ = said(trials, {"lr": "lr"})
    assert words.startswith("The least cross_entropy, 2, is that of lr0.001")


def test_a_trial_whose_config_lacks_its_training_does_not_stop_the_page(tmp_path):
    config = write_sizes(tmp_path, {"small": 100_000, "large": 400_000}, seeds=1)
    Run(tmp_path / "small-seed0-prior").write_config("kind: prior\n")
    assert "large" in write_study_report(config, tmp_path / "report").read_text()


def test_a_picture_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """As where two reports are written at once: under its name there is a whole picture or none."""
    write_training(tmp_path / "a-prior", 100_000)
    config = config_of(tmp_path, {"size": "size"}, {"a": {"size": "a"}})
    write_study_report(config, tmp_path / "report")
    before, save = (tmp_path / "report" / "curves.png").read_bytes(), Figure.savefig

    def half(figure, file, **options):
        if isinstance(file, Path):
            file.write_bytes(b"half")
            raise OSError("the disk is full")
        return save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        write_study_report(config, tmp_path / "report")
    assert (tmp_path / "report" / "curves.png").read_bytes() == before


def test_of_a_step_that_was_done_twice_the_later_validation_counts():
    trials = study(SIZES, 1, 0.0)
    trials[0].steps, trials[0].losses = [2000, 2000], [9.0, 3.5]
    (group,) = analyse(trials, AXES, AnalysisConfig(bootstrap=0)).groups
    assert group.used[0].loss == 3.5


def test_a_prediction_below_the_smallest_size_is_an_extrapolation():
    settings = AnalysisConfig(bootstrap=0, predict=(5e4, 5e5))
    found = analyse(study(SIZES, 2, 0.001), AXES, settings).groups[0].predictions
    assert [one.extrapolation for one in found] == [True, False]


def test_each_amount_of_data_has_a_best_learning_rate_of_its_own():
    trials = [
        trial(f"{steps}-{lr}", 1e5, [steps], [3.0 if lr == best else 4.0], at={"data": str(steps)}, learning_rate=lr)
        for steps, best in ((100, 1e-2), (400, 1e-3))
        for lr in (1e-3, 1e-2)
    ]
    (group,) = analyse(trials, {"size": "size", "data": "data"}, AnalysisConfig(bootstrap=0)).groups
    assert [one.trial for one in group.used if one.best_lr] == ["100-0.01", "400-0.001"]
