"""Against PyTorch's own cross-entropy of all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from stpredict.estimates.live_bytes import LiveBytes
from stpredict.losses import cross_entropy
from stpredict.losses.cross_entropy import Head

TOKENS, WIDTH, CODES = 50, 24, 300


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNKS", 8)  # of which two have seven tokens, and six have six


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, targets and the gradient of each token's loss."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, TOKENS // 2, WIDTH, dtype=dtype), torch.randn(CODES, WIDTH, dtype=dtype)
    return x, weight, torch.randint(CODES, (2, TOKENS // 2)), torch.rand(2, TOKENS // 2)


def head_of(weight: torch.Tensor) -> Head:
    head = Head(WIDTH, CODES, bias=False, dtype=weight.dtype)
    head.weight.data.copy_(weight)
    return head


def whole(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
                           targets.flatten(), reduction="none").view(targets.shape)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_all_logits_at_once(dtype):
    x, weight, targets, gradient = inputs(dtype)
    x.requires_grad_()
    head = head_of(weight)
    loss, right = head(x, targets)
    (loss * gradient).sum().backward()
    x_2, weight_2 = x.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    expected = whole(x_2, weight_2, targets)
    (expected * gradient).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for found, reference in ((x.grad, x_2.grad), (head.weight.grad, weight_2.grad)):
        assert found.dtype == dtype
        assert (found - reference).abs().max() <= tolerance * reference.abs().max()
    assert torch.equal(right > 0, F.linear(x, weight).argmax(-1) == targets)
    assert not right.requires_grad


def test_autocast_computes_products_in_its_type_and_leaves_gradients_in_that_of_the_weight():
    x, weight, targets, gradient = inputs(torch.float32)
    x.requires_grad_()
    head = head_of(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = head(x, targets)
    (loss * gradient).sum().backward()
    low, low_weight = (values.detach().bfloat16().requires_grad_() for values in (x, weight))
    expected = whole(low, low_weight, targets)
    (expected * gradient).sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for found, reference in ((x.grad, low.grad), (head.weight.grad, low_weight.grad)):
        assert found.dtype == torch.float32
        assert (found - reference).abs().max() <= 2e-2 * reference.abs().max()
    of_weight = head.weight.grad
    assert not torch.equal(of_weight, of_weight.bfloat16().float())  # chunks are added up in fp32


def test_the_mean_is_that_of_torchs_own_chunked_loss():
    x, weight, targets, _ = inputs(torch.float32)
    options = torch.nn.LinearCrossEntropyOptions()
    expected = F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=options)
    torch.testing.assert_close(head_of(weight)(x, targets)[0].mean(), expected)


def test_the_logits_of_all_tokens_are_never_alive():
    x, weight, targets, _ = inputs(torch.float32)
    x.requires_grad_()
    head, all_logits, chunk = head_of(weight), 4 * TOKENS * CODES, 4 * 7 * CODES

    def peak(loss_of, backward: bool = True) -> int:
        live = LiveBytes()
        live.ignore((x, head.weight, targets))
        with live:
            loss = loss_of().sum()
            if backward:
                loss.backward()
        x.grad = head.weight.grad = None
        return live.peak

    assert peak(lambda: head(x, targets)[0], backward=False) < 4 * chunk < all_logits
    gradients = 4 * (TOKENS * WIDTH + 2 * CODES * WIDTH)  # of x and of the weight, and its second one at most
    assert peak(lambda: head(x, targets)[0]) < gradients + 4 * chunk < all_logits + gradients
    assert peak(lambda: whole(x, head.weight, targets)) > 2 * all_logits  # what it would be


@pytest.mark.parametrize("chunks", [8, 10 * TOKENS])
def test_what_the_backward_pass_needs_is_one_number_per_token(chunks, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNKS", chunks)
    x, weight, targets, _ = inputs(torch.float32)
    x.requires_grad_()
    head, saved = head_of(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head(x, targets)
    kept = {t.data_ptr(): t.nbytes for t in saved}
    assert sum(kept.values()) <= x.nbytes + head.weight.nbytes + targets.nbytes + 4 * TOKENS
