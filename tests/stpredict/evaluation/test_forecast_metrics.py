"""Every metric against loops over frames and pixels, or a closed form."""

import math

import numpy as np
import pytest

from stpredict.evaluation.forecast_metrics import (
    absolute_errors,
    anomaly_products,
    latitude_weights,
    psnr,
    psnr_wrapped,
    square_errors,
    ssim,
)

RNG = np.random.default_rng(0)


def pair(shape=(2, 3, 9, 11, 2)) -> tuple[np.ndarray, np.ndarray]:
    truth = RNG.random(shape).astype(np.float32)
    return (0.7 * truth + 0.4 * RNG.random(shape)).astype(np.float32), truth


def test_errors_of_a_frame_are_means_over_its_pixels_channel_by_channel():
    prediction, truth = pair()
    squared, absolute = square_errors(prediction, truth), absolute_errors(prediction, truth)
    assert squared.shape == absolute.shape == (2, 3, 2)
    for b, t, c in np.ndindex(2, 3, 2):
        errors = [
            float(p) - float(o) for p, o in zip(prediction[b, t, ..., c].flat, truth[b, t, ..., c].flat, strict=True)
        ]
        assert squared[b, t, c] == pytest.approx(sum(e * e for e in errors) / 99, rel=1e-12)
        assert absolute[b, t, c] == pytest.approx(sum(abs(e) for e in errors) / 99, rel=1e-12)


def test_small_errors_of_large_values_are_not_lost_in_float32():
    truth = np.full((1, 1, 8, 8, 1), 300, np.float32)
    prediction = truth + np.float32(2**-10)
    assert square_errors(prediction, truth).item() == 2**-20


def test_uint8_truth_does_not_wrap():
    truth = np.full((1, 1, 2, 2, 1), 200, np.uint8)
    assert absolute_errors(np.full(truth.shape, 10, np.float32), truth).item() == 190


def test_weights_are_cosines_of_mean_one_and_weigh_the_rows():
    latitudes = [80.0, 60.0, 0.0]
    weights = latitude_weights(latitudes)
    cosines = [math.cos(math.radians(latitude)) for latitude in latitudes]
    np.testing.assert_allclose(weights, np.array(cosines) / (sum(cosines) / 3))
    truth = np.zeros((1, 1, 3, 4, 1), np.float32)
    prediction = truth.copy()
    prediction[0, 0, 1] = 2  # an error in one row alone
    assert square_errors(prediction, truth, weights).item() == pytest.approx(4 * weights[1] / 3)
    assert square_errors(prediction, truth, np.ones(3)).item() == pytest.approx(4 / 3)


def test_anomaly_products_are_sums_over_the_grid_with_the_rows_weights():
    prediction, truth = pair()
    climatology = RNG.random((3, 9, 11, 2))
    weights = latitude_weights(np.linspace(-60, 80, 9).tolist())
    found = anomaly_products(prediction, truth, climatology[None], weights)
    for b, t, c in np.ndindex(2, 3, 2):
        sums = np.zeros(3)
        for y, x in np.ndindex(9, 11):
            p = float(prediction[b, t, y, x, c]) - climatology[t, y, x, c]
            o = float(truth[b, t, y, x, c]) - climatology[t, y, x, c]
            sums += weights[y] * np.array([p * o, p * p, o * o])
        np.testing.assert_allclose(found[:, b, t, c], sums / 99, rtol=1e-10)


def test_psnr_is_of_each_frame_over_all_channels_and_clips_the_prediction():
    prediction, truth = pair()
    prediction += 0.5  # many above 1
    found = psnr(prediction, truth)
    for b, t in np.ndindex(2, 3):
        mse = np.mean(
            [
                (min(max(float(p), 0), 1) - float(o)) ** 2
                for p, o in zip(prediction[b, t].flat, truth[b, t].flat, strict=True)
            ]
        )
        assert found[b, t] == pytest.approx(-10 * math.log10(mse))


def test_wrapped_psnr_is_that_of_uint8_arithmetic():
    prediction, truth = pair()
    found = psnr_wrapped(prediction, truth)
    for b, t in np.ndindex(2, 3):
        one, other = (np.uint8(x[b, t].clip(0, 1) * 255) for x in (prediction, truth))
        squares = (one - other) * (one - other)  # uint8 all the way
        assert squares.dtype == np.uint8
        assert found[b, t] == pytest.approx(20 * math.log10(255) - 10 * math.log10(squares.mean()))


def test_wrapping_inflates():
    truth = np.zeros((1, 1, 8, 8, 1), np.float32)
    wrong = np.full(truth.shape, 17 / 255 + 1e-4, np.float32)  # 17 * 17 = 289 = 33 mod 256
    assert psnr_wrapped(wrong, truth).item() == pytest.approx(10 * math.log10(255**2 / 33))
    assert psnr_wrapped(wrong, truth) > psnr(wrong, truth) + 9


@pytest.mark.parametrize("shape", [(1, 2, 12, 9, 1), (1, 1, 7, 8, 3)])
def test_ssim_agrees_with_loops_over_windows_with_sample_covariances(shape):
    prediction, truth = pair(shape)
    prediction = prediction * 1.5 - 0.2  # some outside [0, 1]: clipped
    found = ssim(prediction, truth, (1.0, 2.0))
    for data_range, values in zip((1.0, 2.0), found, strict=True):
        for b, t in np.ndindex(*shape[:2]):
            expected = naive_ssim(prediction[b, t].clip(0, 1), truth[b, t], data_range)
            assert values[b, t] == pytest.approx(expected, rel=1e-9)


def test_the_published_range_of_two_flatters():
    prediction, truth = pair()
    one, two = ssim(prediction, truth, (1.0, 2.0))
    assert (two > one).all()


def test_ssim_of_a_frame_with_itself_is_one():
    truth = pair()[1]
    np.testing.assert_allclose(ssim(truth, truth)[0], 1)


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="7x7"):
        ssim(*pair((1, 1, 6, 9, 1)))


def naive_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """Of frames (h, w, c): windows one by one, with NumPy's variances and covariances of 48 degrees of freedom."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    h, w, channels = x.shape
    values = []
    for c in range(channels):
        for top in range(h - 6):
            for left in range(w - 6):
                one, other = (z[top : top + 7, left : left + 7, c].astype(float).ravel() for z in (x, y))
                covariance = np.cov(one, other)
                mean, also = one.mean(), other.mean()
                luminance = (2 * mean * also + c1) / (mean**2 + also**2 + c1)
                values.append(luminance * (2 * covariance[0, 1] + c2) / (covariance[0, 0] + covariance[1, 1] + c2))
    return float(np.mean(values))
