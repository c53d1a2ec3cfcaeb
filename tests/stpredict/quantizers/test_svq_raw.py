"""LISTA with the parameters that theory gives, against solvers of the lasso."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from stpredict.quantizers.build import build_quantizer
from stpredict.quantizers.config import SvqRawConfig
from stpredict.quantizers.svq_raw import FIRST_LAMBDA, SvqRaw, unlearned
from stpredict.training.flops import ShapesOnly, count_flops

CHANNELS, CODES = 6, 10


def raw(steps: int, **changes) -> SvqRaw:
    torch.manual_seed(0)
    return build_quantizer(SvqRawConfig(codebook_size=CODES, steps=steps, **changes), CHANNELS)


def latents() -> torch.Tensor:
    return torch.randn(2, 3, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_enough_steps_solve_the_lasso():
    model, x = raw(steps=4000).double(), latents()
    encode, inhibition, threshold = unlearned(model.codebook.detach(), 0.4)
    for parameter, value in zip(
        (model.encode, model.inhibition, model.log_threshold), (encode, inhibition, threshold.log()), strict=True
    ):
        parameter.data.copy_(value)
    weights = torch.cat(list(model.weights(x, locations=5))).numpy()
    # sklearn divides the squares by the number of its samples, which are our channels.
    lasso = Lasso(alpha=0.4 / CHANNELS, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
    for w, vector in zip(weights, x.permute(0, 1, 3, 4, 2).reshape(-1, CHANNELS).numpy(), strict=True):
        right = lasso.fit(model.codebook.detach().numpy().T, vector).coef_
        assert np.abs(w - right).max() < 1e-6
    assert 0 < (weights == 0).mean() < 1


def test_ten_steps_are_ten_proximal_gradient_steps():
    model, x = raw(steps=10).double(), latents()
    codes, vectors = model.codebook.detach(), x.permute(0, 1, 3, 4, 2).reshape(-1, CHANNELS)
    rate = 1 / torch.linalg.matrix_norm(codes, 2) ** 2
    w = torch.zeros(len(vectors), CODES, dtype=torch.float64)
    for _ in range(10):
        w = (w - rate * ((w @ codes - vectors) @ codes.T) - rate * FIRST_LAMBDA).clamp(min=0)
    # The model was made in fp32.
    torch.testing.assert_close(torch.cat(list(model.weights(x))), w, atol=1e-5, rtol=1e-5)
    out, commitment = model(x)
    torch.testing.assert_close(out.permute(0, 1, 3, 4, 2).reshape(-1, CHANNELS), w @ codes, atol=1e-5, rtol=1e-5)
    assert commitment is None


def test_everything_is_learned_and_lambda_stays_positive():
    model = raw(steps=10)
    model(latents().float())[0].square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad.abs().sum() > 0} == {
        *("codebook", "encode", "inhibition", "log_threshold")
    }
    assert sum(p.numel() for p in model.parameters()) == 2 * CODES * CHANNELS + CODES**2 + 1
    assert all(p.ndim for p in model.parameters())  # DeepSpeed trains none without axes


def test_bf16_goes_in_and_out_and_the_steps_are_in_fp32():
    model, x = raw(steps=10).bfloat16(), latents().bfloat16()
    out = model(x)[0]
    assert out.dtype == torch.bfloat16
    assert {part.dtype for part in model.weights(x)} == {torch.float32}
    assert torch.equal(out, model.float()(x.float())[0].bfloat16())


def test_cost_is_quadratic_in_the_codebook():
    location = (torch.empty(1, 1, CHANNELS, 1, 1),)
    quantizers = (build_quantizer(SvqRawConfig(codebook_size=k), CHANNELS) for k in (16, 32))
    macs = [count_flops(ShapesOnly(quantizer), location, {}) / 2 for quantizer in quantizers]
    assert macs == [2 * k * CHANNELS + 9 * k * k for k in (16, 32)]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        SvqRawConfig(steps=0)
