import math

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from stpredict.evaluation.frame_metrics import frame_mse, frame_psnr, frame_ssim


def test_an_error_of_d_grey_levels_everywhere_has_the_closed_forms_of_mse_and_psnr():
    truth = torch.full((2, 3, 8, 8, 3), 100, dtype=torch.uint8)
    for d in (1, 10, 100):
        mse = frame_mse(truth - d, truth)
        assert mse.shape == (2, 3)
        torch.testing.assert_close(mse, torch.full((2, 3), (d / 255) ** 2, dtype=torch.float64))
        torch.testing.assert_close(frame_psnr(mse), torch.full_like(mse, 20 * math.log10(255 / d)))


def test_gaussian_noise_has_the_psnr_of_its_variance():
    truth = torch.full((1, 2, 256, 256, 1), 128.0)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    psnr = frame_psnr(frame_mse(truth + 8 * noise, truth))
    torch.testing.assert_close(psnr, torch.full_like(psnr, 20 * math.log10(255 / 8)), atol=0.05, rtol=0)


def test_frames_are_measured_one_by_one():
    truth = torch.zeros(1, 3, 8, 8, 1, dtype=torch.uint8)
    prediction = truth.clone()
    prediction[:, 1] = 51
    torch.testing.assert_close(frame_mse(prediction, truth), torch.tensor([[0.0, 0.04, 0.0]], dtype=torch.float64))


def test_an_exact_frame_counts_as_an_error_of_a_quarter_grey_level():
    assert frame_psnr(torch.zeros(1, 1, dtype=torch.float64)).item() == pytest.approx(20 * math.log10(4 * 255))


def test_ssim_of_a_clip_with_itself_is_one():
    clip = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(frame_ssim(clip, clip), torch.ones(2, 3, dtype=torch.float64))


def test_ssim_of_two_constant_frames_is_the_luminance_term_alone():
    a, b, c1 = 50 / 255, 200 / 255, 0.01**2
    clips = [torch.full((1, 1, 12, 12, 1), level, dtype=torch.uint8) for level in (50, 200)]
    assert frame_ssim(*clips).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


@pytest.mark.parametrize("shape", [(24, 24, 3), (7, 19, 1)])
def test_ssim_agrees_with_box_filters_over_the_windows_inside_the_frame(shape):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 3, *shape), dtype=np.uint8)
    other = (truth * 0.6 + rng.integers(0, 80, truth.shape)).astype(np.uint8)
    expected = [[_ssim(truth[b, t] / 255, other[b, t] / 255) for t in range(3)] for b in range(2)]
    ssim = frame_ssim(torch.from_numpy(other), torch.from_numpy(truth))
    torch.testing.assert_close(ssim, torch.tensor(expected, dtype=torch.float64))


def test_frames_smaller_than_the_window_are_refused():
    clip = torch.zeros(1, 1, 6, 12, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="7x7"):
        frame_ssim(clip, clip)


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. (2004), eq. 13, of images (h, w, c) in [0, 1]."""
    c1, c2 = 0.01**2, 0.03**2

    def mean(image):
        return uniform_filter(image, size=(7, 7, 1))[3:-3, 3:-3]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
