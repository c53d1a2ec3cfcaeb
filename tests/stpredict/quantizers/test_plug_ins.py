"""The quantizers that choose codes against what their papers say, written out."""

import typing
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_pipeline.errors import UsageError
from stpredict.estimates.shapes import TaskOfShapes
from stpredict.layers.recomputing import Recomputation
from stpredict.quantizers import config as configs
from stpredict.quantizers.build import build_quantizer
from stpredict.quantizers.plug_ins import PlugIn
from stpredict.training.flops import ShapesOnly, count_flops

CHANNELS = 8
SMALL = {
    "vq": configs.VqConfig(codebook_size=16),
    "residual": configs.ResidualVqConfig(codebook_size=16, quantizers=3, shared=False, stochastic=False),
    "residual shared": configs.ResidualVqConfig(codebook_size=16, quantizers=3, stochastic=False),
    "residual stochastic": configs.ResidualVqConfig(codebook_size=16, quantizers=3),
    "grouped": configs.GroupedResidualVqConfig(codebook_size=16, quantizers=3),
    "multi-head": configs.MultiHeadVqConfig(codebook_size=16, heads=4),
    "multi-head, mapped": configs.MultiHeadVqConfig(codebook_size=16, heads=4, code_channels=3),
    "residual fsq": configs.ResidualFsqConfig(levels=(5, 4, 3), quantizers=3),
    "lfq": configs.LfqConfig(codebook_size=16),
    "residual lfq": configs.ResidualLfqConfig(codebook_size=16, quantizers=3),
}
STAGES = {"vq": 1, "grouped": 6, "multi-head": 4, "multi-head, mapped": 4, "lfq": 1}
AVERAGED = ["vq", "residual", "residual shared", "residual stochastic", "grouped", "multi-head", "multi-head, mapped"]


def built(name: str) -> PlugIn:
    torch.manual_seed(0)
    return build_quantizer(SMALL[name], CHANNELS)


def latents(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vectors(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).reshape(-1, x.shape[2])


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([((code - x) ** 2).sum(1) for code in codes]).argmin(0)


def residual(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sum of the codes, numbers, and the squared distance at each stage."""
    total, numbers, losses = torch.zeros_like(x), [], []
    for codes in codebooks:
        numbers.append(nearest(x - total, codes))
        chosen = codes[numbers[-1]]
        losses.append(((x - total - chosen) ** 2).mean())
        total = total + chosen
    return total, numbers, losses


def expected(name: str, model: PlugIn, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Quantized vectors, numbers of each stage and the commitment loss, before codes move."""
    layer = model.layer
    if name == "vq":
        total, numbers, losses = residual(x, [layer.codebook])
    elif name.startswith("residual"):
        total, numbers, losses = residual(x, list(layer.codebooks))
    elif name == "grouped":
        parts = [residual(part, list(rvq.codebooks)) for part, rvq in zip(x.chunk(2, 1), layer, strict=True)]
        total = torch.cat([part[0] for part in parts], 1)
        numbers, losses = ([one for part in parts for one in part[i]] for i in (1, 2))
    else:
        parts = [residual(part, [layer.codebook]) for part in x.chunk(4, 1)]
        total = torch.cat([part[0] for part in parts], 1)
        numbers, losses = ([one for part in parts for one in part[i]] for i in (1, 2))
    return total, numbers, torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["vq", "residual", "residual shared", "grouped", "multi-head"])
def test_the_nearest_codes_are_chosen_and_counted(name):
    model, x = built(name), latents()
    total, numbers, loss = expected(name, model, vectors(x))
    out, commitment = model(x)
    torch.testing.assert_close(vectors(out), total)
    torch.testing.assert_close(commitment, loss)
    assert torch.equal(model.uses, torch.stack([torch.bincount(n, minlength=16) for n in numbers]))


def test_codes_follow_the_vectors_that_chose_them():
    model, x = built("vq"), vectors(latents())
    codes, count, total = model.layer.codebook.clone(), torch.ones(16), model.layer.codebook.clone()
    model(latents())
    chosen = torch.nn.functional.one_hot(nearest(x, codes), 16).float()
    count, total = 0.8 * count + 0.2 * chosen.sum(0), 0.8 * total + 0.2 * chosen.T @ x
    smoothed = (count + 1e-5) / (count.sum() + 16e-5) * count.sum()
    torch.testing.assert_close(model.layer.codebook, total / smoothed[:, None])


def test_gradients_go_straight_through_and_towards_the_codes():
    model, x = built("vq"), latents().requires_grad_()
    total, *_ = expected("vq", model, vectors(x.detach()))
    gradient = torch.randn_like(x)
    out, commitment = model(x)
    ((out * gradient).sum() + commitment).backward()
    towards = 2 * (vectors(x.detach()) - total) / x.numel()
    torch.testing.assert_close(vectors(x.grad), vectors(gradient) + towards)


def test_stochastic_codes_are_drawn_in_training_alone():
    model, x = built("residual stochastic"), latents()
    near = expected("residual shared", model, vectors(x))[0]
    model.eval()
    torch.testing.assert_close(vectors(model(x)[0]), near)
    assert torch.equal(model(x)[0], model(x)[0])
    codes = [part.clone() for part in model.layer.codebooks]
    drawn = vectors(model.train()(x)[0].detach())
    assert all(torch.equal(codes[0], other) for other in codes)  # one codebook for all
    assert ((drawn - near).abs().sum(1) > 1e-5).float().mean() > 0.2


def test_finite_scalars_are_rounded_and_what_is_left_again():
    model, x = built("residual fsq"), latents()
    z = model.project_in(vectors(x)).double()
    levels = torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64)
    limit = 1 + 1 / (levels - 1)
    left = torch.tanh(z / limit) * limit
    total, numbers = torch.zeros_like(z), []
    for stage in range(3):
        steps = (((left * levels**stage).clamp(-1, 1) + 1) / 2 * (levels - 1) + 0.5).floor()
        numbers.append((steps * torch.tensor([1, 5, 20])).sum(1).long())
        code = (2 * steps / (levels - 1) - 1) / levels**stage
        left, total = left - code, total + code
    out, commitment = model(x)
    torch.testing.assert_close(vectors(out), model.project_out(total.float()), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.uses, torch.stack([torch.bincount(n, minlength=60) for n in numbers]))
    assert commitment is None


def entropies(z: Tensor, codes: Tensor) -> Tensor:
    """Of each vector's softmax over codes, less that of their mean (LFQ, eq. 5), by the distances."""
    p = torch.softmax(-100 * torch.cdist(z, codes) ** 2, 1)
    entropy = lambda q: -torch.xlogy(q, q).sum(-1)  # noqa: E731
    return (entropy(p).mean() - entropy(p.mean(0))).detach()


@pytest.mark.parametrize("name", ["lfq", "residual lfq"])
def test_signs_are_taken_and_entropy_is_asked_for(name):
    model, x = built(name), latents()
    left = model.project_in(vectors(x)).double()
    total, losses, numbers = torch.zeros_like(left), [], []
    for stage in range(STAGES.get(name, 3)):
        scale = 2.0**-stage
        signs = torch.where(left > 0, 1.0, -1.0).double()
        numbers.append(((signs > 0) * torch.tensor([8, 4, 2, 1])).sum(1))
        bits = torch.cartesian_prod(*[torch.tensor([-scale, scale], dtype=torch.float64)] * 4)
        losses.append(entropies(left, bits))
        left, total = left - scale * signs, total + scale * signs
    out, loss = model(x)
    torch.testing.assert_close(vectors(out), model.project_out(total.float()))
    assert float(loss.detach()) == pytest.approx(0.1 * float(torch.stack(losses).mean()), abs=1e-4)
    assert torch.equal(model.uses, torch.stack([torch.bincount(n, minlength=16) for n in numbers]))


@pytest.mark.parametrize("name", SMALL)
def test_shapes_stay_and_the_loss_is_for_training(name):
    model, x = built(name), latents().requires_grad_()
    out, loss = model(x)
    (out.sum() + (0 if loss is None else loss)).backward()
    assert out.shape == x.shape
    assert SMALL[name].commits == (loss is not None)
    assert loss is None or (loss.shape == () and loss.requires_grad)
    assert x.grad.abs().sum() > 0
    assert model.uses.sum(1).tolist() == [2 * 3 * 4 * 5] * STAGES.get(name, 3)
    assert model.eval()(x)[1] is None


@pytest.mark.parametrize("name", SMALL)
def test_in_bf16_codes_stay_and_are_chosen_in_fp32(name):
    model, x = built(name).eval(), latents(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    model.bfloat16()
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, before[key]), key
        assert buffer.dtype == before[key].dtype, key
    out, _ = model(x)
    uses = model.uses
    mapped = model.project_in(x.permute(0, 1, 3, 4, 2)).float()
    model.float()
    model.project_in = torch.nn.Identity()
    model(mapped.permute(0, 1, 4, 2, 3))
    assert out.dtype == torch.bfloat16
    assert torch.equal(uses, model.uses)


@pytest.mark.parametrize("name", ["vq", "residual", "grouped", "multi-head"])
def test_autocast_does_not_reach_the_choice_of_codes(name):
    model, x = built(name).eval(), latents()
    out, _ = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x)[0], out)


@pytest.mark.parametrize("name", AVERAGED)
def test_averages_that_recomputation_would_move_twice_are_refused(name):
    model, x = built(name), latents().requires_grad_()
    contexts = lambda: (nullcontext(), Recomputation())  # noqa: E731
    _, commitment = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    with pytest.raises(ValueError, match="leave it out of what is recomputed"):
        commitment.backward()


@pytest.mark.parametrize("name", ["residual fsq", "lfq", "residual lfq"])
def test_those_without_averages_can_be_recomputed(name):
    model, found = built(name), []
    for again in (False, True):
        x = latents().requires_grad_()
        contexts = lambda: (nullcontext(), Recomputation())  # noqa: E731
        out, _ = checkpoint(model, x, use_reentrant=False, context_fn=contexts) if again else model(x)
        out.square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", typing.get_args(typing.get_args(configs.AnyQuantizer)[0]))
def test_every_kind_is_planned_without_memory_and_its_flops_are_counted(kind):
    with torch.device("meta"):
        planned = build_quantizer(kind(), 32)
    assert all(p.is_meta for p in planned.parameters())
    shapes = TaskOfShapes(SimpleNamespace(model=planned, discriminator=None, networks=tuple), torch.bfloat16)
    with shapes.entered():
        x = torch.empty(2, 3, 32, 4, 5, dtype=torch.bfloat16, device="cpu", requires_grad=True)
        out, loss = shapes.task.model(x)
        (out.sum() + (0 if loss is None else loss)).backward()
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert count_flops(ShapesOnly(build_quantizer(kind(), 32)), (torch.zeros(1, 2, 32, 2, 2),), {}) > 0


def test_published_settings_are_the_defaults():
    shapes = {}
    for kind in typing.get_args(typing.get_args(configs.AnyQuantizer)[0]):
        model = build_quantizer(kind(), 32).eval()
        model(torch.zeros(1, 2, 32, 2, 2))
        if isinstance(model, PlugIn):
            shapes[kind.__name__] = tuple(model.uses.shape)
    assert shapes == {
        "VqConfig": (1, 512),
        "ResidualVqConfig": (8, 1024),
        "GroupedResidualVqConfig": (2 * 8, 1024),
        "MultiHeadVqConfig": (8, 1024),
        "ResidualFsqConfig": (8, 8 * 5 * 5 * 3),
        "LfqConfig": (1, 8192),
        "ResidualLfqConfig": (8, 256),
    }


def test_what_cannot_be_is_refused_in_a_line():
    with pytest.raises(UsageError, match="groups 3 does not divide the 8 channels"):
        build_quantizer(configs.GroupedResidualVqConfig(groups=3), CHANNELS)
    with pytest.raises(UsageError, match="heads 3 does not divide the 8 channels"):
        build_quantizer(configs.MultiHeadVqConfig(heads=3), CHANNELS)
    with pytest.raises(ValidationError, match="the nearest is 1024"):
        configs.LfqConfig(codebook_size=1000)
    with pytest.raises(ValidationError, match="8 x 5 x 5 x 3 = 600"):
        configs.ResidualFsqConfig(codebook_size=1024)
    assert configs.ResidualFsqConfig(levels=(8, 5, 5, 5), codebook_size=1000).codebook_size == 1000
