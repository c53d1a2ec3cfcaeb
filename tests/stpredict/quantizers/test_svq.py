"""SVQ against the paper's architecture written out, with weights of all codes for every location."""

import pytest
import torch
from torch import Tensor, nn

from stpredict.quantizers.build import build_quantizer
from stpredict.quantizers.config import SvqConfig
from stpredict.quantizers.svq import Svq, drawn_codebook

CHANNELS, CODES = 6, 40
VARIANTS = {
    "learnable": {},
    "frozen": {"learnable": False},
    "one layer": {"hidden": None},
    "bucket": {"hidden": CODES},
}


def svq(**changes) -> Svq:
    torch.manual_seed(0)
    return build_quantizer(SvqConfig(**{"codebook_size": CODES, "hidden": 16} | changes), CHANNELS)


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def written_out(model: Svq, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized latents and W ``(b, t, h, w, K)``, as published."""
    h = x.permute(0, 1, 3, 4, 2)
    if not isinstance(model.mlp, nn.Identity):
        h = torch.relu(h @ model.mlp[0].weight.T + model.mlp[0].bias)
    weights = h @ model.codes.weight.T + model.codes.bias
    return (weights @ model.codebook).permute(0, 1, 4, 2, 3), weights


def out_and_gradients(model: Svq, x: Tensor, naive: bool) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = written_out(model, x)[0] if naive else model(x)[0]
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)
    (out * target).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_are_those_of_the_published_architecture(variant, dtype, tolerance):
    model = svq(**VARIANTS[variant]).to(dtype)
    ours = out_and_gradients(model, latents(dtype), naive=False)
    theirs = out_and_gradients(model, latents(dtype), naive=True)
    assert len(ours) == 2 + len(list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_at_the_papers_size_the_result_is_the_same_to_1e_5():
    torch.manual_seed(0)
    model = build_quantizer(SvqConfig(init="normal"), 32)
    x = torch.randn(1, 2, 32, 8, 8)
    for a, b in zip(out_and_gradients(model, x, False), out_and_gradients(model, x, True), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_times_codebook_are_the_output_and_come_in_order(variant):
    model, x = svq(**VARIANTS[variant]), latents()
    parts = list(model.weights(x, locations=7))
    assert {len(part) for part in parts[:-1]} == {7}
    weights = torch.cat(parts)
    torch.testing.assert_close(weights, written_out(model, x)[1].reshape(-1, CODES))
    product = (weights @ model.codebook).view(2, 3, 4, 5, CHANNELS)
    torch.testing.assert_close(product.permute(0, 1, 4, 2, 3), model(x)[0])


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SvqConfig(), 1_614_224),  # specs: t2m, S = 32
        (SvqConfig(hidden=1280, codebook_size=1280), 33 * 1280 + 1281 * 1280 + 1280 * 32),
        (SvqConfig(hidden=None), 33 * 10_000 + 10_000 * 32),
    ],
)
def test_sizes_are_the_published_ones(config, parameters):
    model = build_quantizer(config, 32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    frozen = build_quantizer(config.model_copy(update={"learnable": False}), 32)
    assert sum(p.numel() for p in frozen.parameters()) == parameters - 32 * config.codebook_size


def test_published_multiply_adds_make_up_what_svq_adds_to_t2m():
    locations = 12 * 16 * 32
    assert build_quantizer(SvqConfig(), 32).published_macs(locations) == pytest.approx((16.86 - 7.006) * 1e9, rel=1e-3)
    assert svq(hidden=None).published_macs(3) == 3 * 2 * CHANNELS * CODES


def test_a_frozen_codebook_is_exported_and_never_learns():
    model = svq(learnable=False)
    before = model.codebook.clone()
    assert "codes.codebook" in model.state_dict()
    assert "codes.codebook" not in dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(latents())[0].square().sum().backward()
    optimizer.step()
    assert torch.equal(model.codebook, before)


def test_nothing_as_wide_as_the_codebook_is_made_of_a_location():
    model, x = svq(codebook_size=5000), latents()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(x)
    assert kept
    assert all(shape.numel() <= 5000 * 16 for shape in kept)  # no more than the weights themselves: W has 600,000


def test_in_bf16_the_factors_are_multiplied_in_fp32():
    model, x = svq(codebook_size=5000).bfloat16(), latents(torch.bfloat16)
    out = model(x)[0]
    assert out.dtype == torch.bfloat16
    rounded_once = written_out(model.float(), x.float())[0]
    assert (out.float() - rounded_once).abs().max() <= 0.02 * rounded_once.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.codes.product()[0].dtype == torch.float32
    assert svq().bfloat16().codes.product()[0].dtype == torch.float32


def test_codebooks_have_the_spread_of_their_initialisation():
    torch.manual_seed(0)
    codes, channels = 10_000, 32
    for init, spread in {
        "normal": 1.0,
        "kaiming_uniform": (2 / channels) ** 0.5,
        "xavier_uniform": (2 * 2 / (codes + channels)) ** 0.5,
        "orthogonal": codes**-0.5,
    }.items():
        codebook = drawn_codebook(codes, channels, init)
        assert codebook.std().item() == pytest.approx(spread, rel=0.02), init
    assert torch.allclose(codebook.T @ codebook, torch.eye(channels), atol=1e-5)
    with pytest.raises(ValueError, match="ones"):
        drawn_codebook(4, 4, "ones")
