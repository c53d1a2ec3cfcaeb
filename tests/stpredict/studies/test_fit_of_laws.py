import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit, minimize
from synthetic_study import ALPHA, BETA, A, B, E, loss_of, sizes

from stpredict.studies.bootstrap import copies, corrected
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.fit import HUBER_DELTA, Form, fit, huber, minimise
from stpredict.studies.power_law import fit_power_law

N = np.repeat(sizes(6), 2)
NOISE = 0.003 * np.random.default_rng(3).standard_normal(len(N))
MANY_N, MANY_D = (grid.ravel() for grid in np.meshgrid(sizes(6), np.geomspace(1e7, 1e9, 8)))
MANY_NOISE = 0.003 * np.random.default_rng(4).standard_normal(len(MANY_N))


def test_constants_of_losses_without_noise_are_found_to_seven_digits():
    form = Form(np.log([MANY_N, MANY_D]))
    theta, delta = fit(form, np.log(loss_of(MANY_N, MANY_D)))
    found = [form.floor(theta), *form.term(theta, 0), *form.term(theta, 1)]
    np.testing.assert_allclose(found, [E, A, ALPHA, B, BETA], rtol=1e-7)
    assert delta == HUBER_DELTA


def test_least_squares_agree_with_curve_fit():
    log_y = np.log(E + A * N**-ALPHA) + NOISE
    form = Form(np.log(N))
    theta = minimise(form, log_y[None], fit(form, log_y)[0], np.inf)[0]

    def law(n, e, a, p):
        return np.log(e + a * n**-p)

    theirs, _ = curve_fit(law, N, log_y, p0=(E, A, ALPHA), ftol=1e-14, xtol=1e-14)
    np.testing.assert_allclose([form.floor(theta), *form.term(theta, 0)], theirs, rtol=1e-4)


def test_without_a_floor_it_is_linear_regression_of_logarithms():
    """Losses that bend the other way leave nothing to E."""
    log_y = np.log(A * N**-ALPHA) - 0.02 * (np.log(N) - np.log(N).mean()) ** 2
    form = Form(np.log(N))
    theta = minimise(form, log_y[None], fit(form, log_y)[0], np.inf)[0]
    slope, level = np.polyfit(np.log(N), log_y, 1)
    a, p = form.term(theta, 0)
    assert form.floor(theta) < 1e-5
    np.testing.assert_allclose([p, np.log(a)], [-slope, level], rtol=1e-4)


@pytest.mark.parametrize("delta", [HUBER_DELTA, 0.004])
def test_no_other_optimiser_finds_a_lower_huber_loss(delta):
    form = Form(np.log([MANY_N, MANY_D]))
    log_y = np.log(loss_of(MANY_N, MANY_D)) + MANY_NOISE
    theta = minimise(form, log_y[None], fit(form, log_y)[0], delta)[0]
    ours = huber(log_y - form.log_loss(theta)[0], delta)

    def loss(constants):
        e, a, alpha, b, beta = constants
        logs = np.stack([np.full(len(MANY_N), e), a - alpha * np.log(MANY_N), b - beta * np.log(MANY_D)])
        r = np.abs(log_y - np.logaddexp.reduce(logs))
        return np.where(r < delta, r**2 / 2, delta * (r - delta / 2)).sum() * 1e6

    truth = [np.log(E), np.log(A), ALPHA, np.log(B), BETA]
    theirs = min(
        minimize(loss, np.array(truth) * scale, method="BFGS", options={"gtol": 1e-9}).fun / 1e6
        for scale in (1, 0.9, 1.1)
    )
    assert ours <= theirs * (1 + 1e-4)


def test_one_bad_run_hardly_moves_the_fit():
    log_y = np.log(E + A * N**-ALPHA) + NOISE
    bad = log_y.copy()
    bad[4] += 0.1
    form = Form(np.log(N))
    alpha = {name: form.term(fit(form, y)[0], 0)[1] for name, y in (("clean", log_y), ("bad", bad))}
    squares = form.term(minimise(form, bad[None], fit(form, bad)[0], np.inf)[0], 0)[1]
    assert abs(alpha["bad"] - alpha["clean"]) < 0.5 * abs(squares - alpha["clean"])


def test_copies_are_fitted_as_each_would_be_by_itself():
    form = Form(np.log(N))
    log_y = np.log(E + A * N**-ALPHA) + NOISE
    theta, delta = fit(form, log_y)
    noisy = copies(form, theta, log_y, np.arange(len(N)), 9, 20)
    together = minimise(form, noisy, theta, delta)
    for copy, ours in zip(noisy, together, strict=True):
        starts = np.stack([theta, theta + 0.1, theta - 0.1])
        alone = minimise(form, np.repeat(copy[None], 3, axis=0), starts, delta)
        least = huber(copy - form.log_loss(alone), delta).min()
        assert huber(copy - form.log_loss(ours)[0], delta) <= least * (1 + 1e-4)


def test_the_points_of_a_run_move_together_in_every_copy():
    """What makes the bootstrap a clustered one: a run's residuals keep their ratios."""
    form = Form(np.log(MANY_N))
    log_y = np.log(E + A * MANY_N**-ALPHA) + MANY_NOISE
    run = np.repeat(np.arange(len(MANY_N) // 4), 4)
    theta, _ = fit(form, log_y)
    noisy = copies(form, theta, log_y, run, 9, 50) - form.log_loss(theta)[0]
    ratios = (noisy / corrected(form, theta, log_y, run)).reshape(50, -1, 4)
    np.testing.assert_allclose(ratios, ratios[..., :1] * np.ones(4), rtol=1e-9)
    assert np.unique(np.round(ratios[0, :, 0] / ratios[0, 0, 0], 6)).size > 2


def test_copies_of_few_runs_have_the_tails_of_student():
    """Webb's weights reach 1.22; divided by the root of chi2_2 / 2 they go beyond it as often as that says."""
    form = Form(np.log(N))
    log_y = np.log(E + A * N**-ALPHA) + NOISE
    run = np.arange(len(N))
    theta, _ = fit(form, log_y)
    noisy = copies(form, theta, log_y, run, 2, 4000) - form.log_loss(theta)[0]
    weights = np.abs(noisy / corrected(form, theta, log_y, run))
    beyond = np.mean([stats.chi2.cdf(2 * square / 9, 2) for square in (0.5, 1, 1.5)])
    assert (weights > 3).mean() == pytest.approx(beyond, rel=0.15)


def test_corrected_residuals_are_those_of_a_fit_without_the_run():
    """To first order: beside refitting without each run, for small noise."""
    log_y = np.log(E + A * N**-ALPHA) + NOISE / 100
    form = Form(np.log(N))
    theta = minimise(form, log_y[None], fit(form, log_y)[0], np.inf)[0]
    left_out = []
    for i in range(len(N)):
        rest = np.arange(len(N)) != i
        part = Form(np.log(N[rest]))
        refit = minimise(part, log_y[None, rest], fit(part, log_y[rest])[0], np.inf)
        left_out.append(log_y[i] - part.log_loss(refit, np.log(N[i : i + 1]))[0, 0])
    ours = corrected(form, theta, log_y, np.arange(len(N)))
    np.testing.assert_allclose(ours, left_out, rtol=0.05, atol=1e-6)


def test_a_power_law_and_its_interval_are_those_of_linear_regression():
    x, y = sizes(5), 0.1 * sizes(5) ** -0.4 * np.exp([0.02, -0.01, 0.0, 0.03, -0.02])
    law = fit_power_law("lr(N)", x, y, AnalysisConfig(), of="", source="")
    theirs = stats.linregress(np.log(x), np.log(y))
    p = law.constants["p"]
    half = stats.t.ppf(0.975, 3) * theirs.stderr
    np.testing.assert_allclose([p.value, p.low, p.high], theirs.slope + np.array([0, -half, half]), rtol=1e-9)
    assert law.constants["k"].value == pytest.approx(np.exp(theirs.intercept))
    assert law.at(parameters=1e6) == pytest.approx(np.exp(theirs.intercept + theirs.slope * np.log(1e6)))
