import json

import numpy as np
import pytest
from synthetic_study import ALPHA, AXES, BETA, CURVE, TOKENS, A, B, E, loss_of, sizes, study, trial

from stpredict.run import Status
from stpredict.studies.analyse import analyse
from stpredict.studies.analysis import Analysis, Group
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.frontier import _other_seeds

CURVES = AnalysisConfig(points="curve", bootstrap=300, curve_from=0.05)
FINAL = AnalysisConfig(bootstrap=300)


def group_of(trials, analysis=FINAL, axes=AXES) -> Group:
    (group,) = analyse(trials, axes, analysis).groups
    return group


def whys(group: Group, name: str) -> list[str]:
    return [one.why for one in group.not_fitted if one.name == name]


@pytest.fixture(scope="module")
def of_curves() -> Analysis:
    settings = CURVES.model_copy(update={"predict": (1e7, 1e8), "predict_tokens": (1e9,)})
    return analyse(study(sizes(7), 2, 0.002, CURVE, random=1), AXES, settings)


@pytest.mark.parametrize(
    ("name", "of", "truth"),
    [
        ("L(N)", "", {"E": E + B * (2000 * TOKENS) ** -BETA, "A": A, "alpha": ALPHA}),
        ("L(D)", "n547723", {"E": E + A * 547723**-ALPHA, "B": B, "beta": BETA}),
        ("L(N, D)", "", {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}),
        ("N_opt(C)", "joint law", {"a": BETA / (ALPHA + BETA)}),
        ("D_opt(C)", "joint law", {"b": ALPHA / (ALPHA + BETA)}),
        ("N_opt(C)", "parabolas", {"a": BETA / (ALPHA + BETA)}),
        ("D_opt(C)", "parabolas", {"b": ALPHA / (ALPHA + BETA)}),
        ("L(C)", "", {"E": E, "gamma": ALPHA * BETA / (ALPHA + BETA)}),
    ],
)
def test_the_constants_that_losses_were_made_with_are_in_their_intervals(of_curves, name, of, truth):
    (law,) = [law for law in of_curves.groups[0].laws if (law.name, law.of) == (name, of)]
    for constant, value in truth.items():
        found = law.constants[constant]
        assert found.low < value < found.high, (constant, found, value)
        assert found.low <= found.value <= found.high
    assert law.interval.startswith("95%")


def test_an_analysis_is_the_same_after_json_and_when_made_again(of_curves):
    assert Analysis.model_validate_json(of_curves.model_dump_json()) == of_curves
    settings = CURVES.model_copy(update={"predict": (1e7, 1e8), "predict_tokens": (1e9,)})
    assert analyse(study(sizes(7), 2, 0.002, CURVE, random=1), AXES, settings) == of_curves


def test_residuals_of_every_point_are_those_of_the_law_that_is_written(of_curves):
    for law in of_curves.groups[0].laws:
        for point in law.points:
            fitted = law.at(parameters=point.parameters, tokens=point.tokens, flops=point.flops)
            assert fitted == pytest.approx(point.fitted, rel=1e-6)
            assert point.residual == pytest.approx(np.log(point.measured / fitted), abs=1e-6)
    assert {name for point in of_curves.groups[0].find("L(N, D)")[0].points for name in point.trials} == {
        trial.trial for trial in of_curves.groups[0].used
    }


def test_predictions_say_that_they_are_extrapolations_and_how_far(of_curves):
    near, far = [one for one in of_curves.groups[0].predictions if one.law == "L(N, D)"]
    assert near.loss.low < loss_of(1e7, 1e9) < near.loss.high
    assert near.extrapolation
    assert near.factor == pytest.approx(1e7 / 3e6, rel=1e-6)
    assert near.token_factor == pytest.approx(5)
    assert not any("times the largest size" in warning for warning in near.warnings)
    assert any("33.3 times the largest size" in warning for warning in far.warnings)
    at_their_tokens = [one for one in of_curves.groups[0].predictions if one.law == "L(N)"]
    assert [one.tokens for one in at_their_tokens] == [pytest.approx(2000 * TOKENS)] * 2


def test_a_prediction_within_the_sizes_is_no_extrapolation_and_a_vague_one_is_called_so():
    settings = FINAL.model_copy(update={"predict": (5e5, 1e7)})
    within, beyond = group_of(study(sizes(5), 2, 0.03), settings).predictions
    assert not within.extrapolation
    assert within.warnings == []
    assert any("is wider than what the law expects" in warning for warning in beyond.warnings)


def test_optima_of_curves_without_noise_are_those_of_the_joint_law_in_closed_form():
    group = group_of(study(sizes(9), 1, 0, np.arange(10, 2001)), CURVES)
    optima = [slot for slot in group.iso_flops if slot.optimum]
    assert len(optima) >= 5
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    for slot in optima:
        n = g * (slot.flops / 6) ** (BETA / (ALPHA + BETA))
        assert slot.optimum.parameters == pytest.approx(n, rel=0.05)
        assert slot.optimum.tokens == pytest.approx(slot.flops / 6 / n, rel=0.05)
        assert slot.optimum.loss == pytest.approx(loss_of(n, slot.flops / 6 / n), rel=1e-3)
    law = next(law for law in group.laws if (law.name, law.of) == ("N_opt(C)", "joint law"))
    assert law.at(flops=1e15) == pytest.approx(g * (1e15 / 6) ** (BETA / (ALPHA + BETA)), rel=1e-5)
    law = next(law for law in group.laws if (law.name, law.of) == ("D_opt(C)", "joint law"))
    assert law.at(flops=1e15) == pytest.approx((1e15 / 6) ** (ALPHA / (ALPHA + BETA)) / g, rel=1e-5)


def test_the_envelope_is_the_least_of_the_curves():
    group = group_of(study(sizes(9), 1, 0, np.arange(10, 2001)), CURVES)
    for point in group.frontier:
        of_every_size = [
            loss_of(n, point.flops / 6 / n) for n in np.round(sizes(9)) if 10 <= point.flops / 6 / n / TOKENS <= 2000
        ]
        assert point.loss == pytest.approx(min(of_every_size), rel=1e-4)
    assert {point.edge for point in group.frontier} == {True, False}


def test_the_frontier_reaches_from_the_first_c_to_the_last_that_three_sizes_have():
    n = np.round(sizes(6))
    trials = study(n, 2, 0.001, CURVE)
    late = trials[5]  # of the third size, a run that begins later than its twin
    late.steps, late.losses = late.steps[3:], late.losses[3:]
    points = group_of(trials, CURVES).frontier
    assert points[0].flops == pytest.approx(6 * n[2] * TOKENS * CURVE[3], rel=1e-6)
    assert points[-1].flops == pytest.approx(6 * n[3] * TOKENS * CURVE[-1], rel=1e-6)


def test_the_law_of_sizes_is_at_the_most_tokens_that_every_run_came_to():
    trials = [*study(sizes(5)[:2], 1, 0, CURVE), *study(sizes(5)[2:], 1, 0, CURVE[CURVE <= 1000])]
    (law,) = group_of(trials, CURVES).find("L(N)")
    last = CURVE[CURVE <= 1000][-1] * TOKENS
    assert [point.tokens for point in law.points] == [pytest.approx(last)] * 5
    assert [point.measured for point in law.points] == [
        pytest.approx(loss_of(round(n), last), rel=1e-3) for n in sizes(5)
    ]


def test_other_seeds_would_have_shifted_a_mean_by_its_standard_error():
    """Under Student's t of 11 degrees of freedom, whose variance is 11 / 9."""
    runs = np.random.default_rng(0).normal(size=(12, 1)) + 5
    shifts = _other_seeds([runs], 40_000)
    error = runs.std(ddof=1) / np.sqrt(12)
    assert shifts.shape == (40_000, 1, 1)
    assert shifts.mean() == pytest.approx(0, abs=0.02 * error)
    assert shifts.std() == pytest.approx(error * np.sqrt(11 / 9), rel=0.02)


def test_runs_laid_out_for_equal_compute_give_parabolas_from_their_last_points():
    """Under a falling learning rate: one length of each size for every C."""
    trials = []
    for c in (3e14, 1e15, 3e15, 1e16):
        best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** (BETA / (ALPHA + BETA))
        for n in np.round(best * np.geomspace(1 / 3, 3, 5)):
            steps = c / 6 / n / TOKENS
            losses = [loss_of(n, round(steps) * TOKENS)]
            trials.append(trial(f"{c}-{n}", n, [steps], losses, at={"data": f"{c:.0e}"}, schedule="cosine"))
    group = group_of(trials, axes={"size": "size", "seed": "seed", "data": "data"})
    assert len(group.iso_flops) == 4
    assert {slot.source for slot in group.iso_flops} == {"final"}
    (law,) = [law for law in group.laws if (law.name, law.of) == ("N_opt(C)", "parabolas")]
    assert law.constants["a"].value == pytest.approx(BETA / (ALPHA + BETA), abs=0.03)
    assert "Student's t, 2 degrees" in law.interval
    (joint,) = group.find("L(N, D)")
    assert joint.constants["alpha"].value == pytest.approx(ALPHA, rel=1e-3)
    assert group.find("L(C)")[0].constants["gamma"].value == pytest.approx(ALPHA * BETA / (ALPHA + BETA), rel=0.05)


def rates(n: float, grid, best: float, seeds: int = 2, **facts):
    """Losses that are parabolas in ln lr, least at ``best``."""
    draw = np.random.default_rng(0)
    return [
        trial(
            f"{n:.0f}-{lr:g}-{seed}", n, [2000],
            [loss_of(n, 2e8) + 0.05 * np.log(lr / best) ** 2 + 1e-4 * draw.standard_normal()],
            at={"lr": f"{lr:g}", "seed": str(seed)}, learning_rate=lr, **facts,
        )
        for lr in grid
        for seed in range(seeds)
    ]  # fmt: skip


LR_AXES = {**AXES, "lr": "lr"}


def test_the_best_learning_rate_is_the_vertex_of_the_parabola_and_its_law_is_found():
    grid = np.geomspace(1e-4, 1e-1, 10)
    trials = [one for n in sizes(5) for one in rates(n, grid, 3.0 * n**-0.5)]
    group = group_of(trials, FINAL, LR_AXES)
    for best in group.learning_rates:
        assert best.vertex == pytest.approx(3.0 * best.parameters**-0.5, rel=0.02)
        assert best.best == min(grid, key=lambda lr: abs(np.log(lr / best.vertex)))
        assert not best.at_edge
        assert [one.seeds for one in best.tried] == [2] * 10
    (law,) = group.find("lr(N)")
    assert law.others == 5, "a rate of each size"
    assert law.constants["p"].low < -0.5 < law.constants["p"].high
    assert law.constants["p"].value == pytest.approx(-0.5, abs=0.02)


def test_each_amount_of_data_has_a_law_of_learning_rates_of_its_own():
    grid, trials = np.geomspace(1e-4, 1e-1, 10), []
    for data, factor in (("100", 3.0), ("400", 1.0)):
        for n in sizes(4):
            for one in rates(n, grid, factor * n**-0.5):
                one.at = {**one.at, "data": data}
                trials.append(one)
    laws = {law.of: law for law in group_of(trials, FINAL, {**LR_AXES, "data": "data"}).find("lr(N)")}
    assert laws["100"].at(parameters=1e6) == pytest.approx(3e-3, rel=0.05)
    assert laws["400"].at(parameters=1e6) == pytest.approx(1e-3, rel=0.05)


def test_only_runs_at_the_best_learning_rate_of_their_size_take_part_in_the_laws():
    trials = [one for n in sizes(5) for one in rates(n, (1e-4, 1e-3, 1e-2), 1e-3)]
    group = group_of(trials, FINAL, LR_AXES)
    (law,) = group.find("L(N)")
    assert {name.split("-")[1] for point in law.points for name in point.trials} == {"0.001"}
    assert [one.trial for one in group.used if one.best_lr] == [one.name for one in trials if "-0.001-" in one.name]
    assert len(group.used) == len(trials)


def test_a_best_learning_rate_at_the_edge_is_flagged_and_has_no_vertex():
    trials = [one for n in sizes(3) for one in rates(n, (1e-4, 1e-3, 1e-2), 1e-5)]
    group = group_of(trials, FINAL, LR_AXES)
    assert all(best.at_edge and best.vertex is None and best.best == 1e-4 for best in group.learning_rates)
    assert sum("at the edge of those tried" in warning for warning in group.warnings) == 3
    assert "at the grid's edge: n100000" in whys(group, "lr(N)")[0]


def test_a_best_learning_rate_whose_larger_neighbours_diverged_is_at_no_edge():
    trials = [one for n in sizes(3) for one in rates(n, (1e-4, 1e-3, 1e-2, 1e-1), 1e-2)]
    for one in trials:
        if one.learning_rate >= 1e-2 and one.at["size"] != "n100000":
            one.diverged = "its validation at step 9 is not finite"
    group = group_of(trials, FINAL, LR_AXES)
    assert [(best.best, best.at_edge, best.diverges_at) for best in group.learning_rates] == [
        (1e-2, False, None),
        (1e-3, False, 1e-2),
        (1e-3, False, 1e-2),
    ]
    assert not any("may lie beyond" in warning for warning in group.warnings)
    assert "(the next larger rate diverges: n547723, n3000000; try some between)" in whys(group, "lr(N)")[0]
    low = [one for n in sizes(3) for one in rates(n, (1e-4, 1e-3, 1e-2), 1e-5)]
    for one in low:
        if one.learning_rate == 1e-2:
            one.diverged = "its validation at step 9 is not finite"
    assert all(best.at_edge for best in group_of(low, FINAL, LR_AXES).learning_rates)


def test_what_is_left_out_is_named_with_the_reason():
    trials = study(sizes(4), 2)
    trials[0].diverged = "its validation at step 9 is not finite"
    trials[1].status = Status(kind="prior", state="running", step=77)
    trials[2].scale = None
    trials[3].status = None
    group = group_of(trials)
    assert {one.trial: one.why for one in group.left_out} == {
        trials[0].name: "diverged: its validation at step 9 is not finite",
        trials[1].name: "not finished: running, at step 77",
        trials[2].name: "its size is not known: there is no scale.json in its run; training on writes it",
        trials[3].name: "not begun",
    }
    assert [one.trial for one in group.used] == [one.name for one in trials[4:]]


def test_trials_are_grouped_by_the_axes_to_compare():
    trials = []
    for label, more in (("1", 0.0), ("8", 0.3)):
        for one in study(sizes(4), 2, law=lambda n, d, more=more: loss_of(n, d) + more):
            one.at = {**one.at, "block": label}
            trials.append(one)
    first, second = analyse(trials, {**AXES, "block": "other"}, FINAL).groups
    assert (first.at, second.at) == ({"block": "1"}, {"block": "8"})
    assert len(first.used) == len(second.used) == 8
    losses = [group.find("L(N)")[0].at(parameters=1e6) for group in (first, second)]
    assert losses[1] == pytest.approx(losses[0] + 0.3, abs=0.02)


def test_fewer_than_three_sizes_are_not_fitted_and_that_is_said():
    group = group_of(study(sizes(2), 3, steps=CURVE), CURVES)
    assert group.find("L(N)") == group.find("L(N, D)") == []
    assert whys(group, "L(N)") == ["2 sizes with a run at the same number of tokens; a fit takes three or more"]
    assert whys(group, "L(N, D)") == ["2 sizes; a fit takes three or more"]
    assert len(group.find("L(D)")) == 2


def test_one_length_of_runs_gives_no_law_of_tokens():
    group = group_of(study(sizes(5), 2))
    assert whys(group, "L(N, D)") == ["1 number of tokens; a fit takes three or more"]
    assert len(whys(group, "L(D)")) == 5
    assert "laid out for the same C" in whys(group, "L(C)")[0]


def test_three_sizes_give_a_law_without_an_interval():
    (law,) = group_of(study(sizes(3), 2)).find("L(N)")
    assert law.constants["alpha"].low is None
    assert law.interval == "none: three constants go through three sizes, whatever the law is"
    assert any("nothing is left over" in warning for warning in law.warnings)


def test_too_few_runs_give_a_law_without_an_interval():
    (law,) = group_of(study(sizes(4), 1)).find("L(N)")
    assert law.constants["alpha"].low is None
    assert law.interval == "none: 4 runs leave 1 degrees of freedom; an interval takes two or more"


def test_losses_that_do_not_fall_with_size_are_not_fitted():
    group = group_of(study(sizes(5), 2, law=lambda n, d: 2 + 0.1 * np.log(n / 3e5) ** 2 + 0 * d))
    assert group.find("L(N)") == []
    assert "the loss does not fall with N" in whys(group, "L(N)")[0]


def test_a_rise_between_sizes_is_named():
    trials = study(sizes(6), 2, 0.0005)
    for one in trials[4:6]:
        one.losses = [loss * 1.3 for loss in one.losses]
    (law,) = group_of(trials).find("L(N)")
    assert any("the loss rises from N =" in warning for warning in law.warnings)
    assert any("further off the law than their seeds differ" in warning for warning in law.warnings)


def test_an_exponent_at_its_bound_is_not_fitted():
    group = group_of(study(sizes(5), 2, 0, law=lambda n, d: 3 + 1e3 * (n / 1e4) ** -6.0 + 0 * d))
    assert "alpha ran to its most" in whys(group, "L(N)")[0]


def test_a_floor_that_the_points_do_not_show_is_called_so():
    (law,) = group_of(study(sizes(5), 2, 0.01, law=lambda n, d: A * n**-0.1 + 0 * d)).find("L(N)")
    assert any("E is not identified" in warning or "E ran to zero" in warning for warning in law.warnings)


def test_curves_under_a_falling_learning_rate_are_refused():
    found = analyse(study(sizes(4), 2, steps=CURVE, schedule="cosine"), AXES, CURVES)
    assert found.points == "final"
    assert "the learning rate falls (schedule: cosine)" in found.warnings[0]
    assert found.groups[0].find("L(D)") == []


def test_points_of_warm_up_are_no_part_of_a_curve():
    trials = study(sizes(4), 2, steps=CURVE, warmup_steps=50)
    for one in trials:
        one.losses = [loss * (9 if step <= 50 else 1) for step, loss in zip(one.steps, one.losses, strict=True)]
    (law,) = group_of(trials, CURVES.model_copy(update={"curve_from": 0})).find("L(N, D)")
    assert min(point.tokens for point in law.points) > 50 * TOKENS
    assert law.scatter < 0.01


def test_an_early_part_of_curves_that_is_off_the_law_is_named_and_can_be_left_out():
    law = lambda n, d: loss_of(n, d) + 30 * np.exp(-d / (20 * TOKENS))  # noqa: E731
    trials = study(sizes(4), 2, 0.001, CURVE, law=law)
    early = group_of(trials, CURVES).find("L(N, D)")[0]
    late = group_of(trials, CURVES.model_copy(update={"curve_from": 0.4})).find("L(N, D)")[0]
    assert any("a larger curve_from" in warning for warning in early.warnings)
    assert not any("a larger curve_from" in warning for warning in late.warnings)
    assert min(point.tokens for point in late.points) >= 0.4 * 2000 * TOKENS


def test_look_up_tables_can_be_left_out_of_n():
    group = group_of(study(sizes(4), 2), FINAL.model_copy(update={"parameters": "without_embeddings"}))
    assert group.used[0].parameters == round(1e5) - round(1e4)


def test_repeated_samples_are_warned_of():
    assert any("seen up to 7 times" in warning for warning in group_of(study(sizes(4), 2, epochs=7.0)).warnings)
    assert group_of(study(sizes(4), 2, epochs=1.0)).warnings == []


def test_compute_that_cannot_be_counted_leaves_the_other_laws():
    trials = study(sizes(5), 2, steps=CURVE)
    for one in trials:
        one.scale = one.scale.model_copy(update={"flops_per_step": None})
    group = group_of(trials, CURVES)
    assert whys(group, "L(C)") == ["the models' FLOPs could not be counted"]
    assert group.find("L(N, D)")[0].points[0].flops is None
    json.loads(group.model_dump_json())


def test_no_trials_done_is_an_analysis_all_the_same():
    trials = study(sizes(4), 2)
    for one in trials:
        one.status = None
    group = group_of(trials)
    assert len(group.left_out) == 8
    assert group.laws == group.not_fitted == []
