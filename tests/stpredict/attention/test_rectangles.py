"""Block-causal attention by rectangles: an operator that is counted, recomputed, compiled, and run without memory."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stpredict.attention import kernels
from stpredict.attention.attention import attention
from stpredict.attention.masks import BlockCausal
from stpredict.attention.rectangles import block_causal, by_columns, by_rows
from stpredict.attention.reference import dense_mask


@pytest.mark.parametrize("pieces", [by_rows, by_columns])
@pytest.mark.parametrize(("block", "prefix"), [(1, 0), (5, 0), (5, 11), (32, 0), (40, 3), (300, 9), (3, 40), (5, 131)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("chunk", "staircases"), [(16, True), (32, True), (32, False)])
def test_the_pieces_are_every_pair_once(pieces, block, prefix, ragged, chunk, staircases):
    n = 131
    mask = BlockCausal(block, prefix, torch.tensor([prefix]) if ragged else None)
    seen = torch.zeros(n, n, dtype=torch.int)
    for piece in pieces(n, mask, SimpleNamespace(chunk=chunk, staircases=staircases)):
        rows, keys = torch.arange(n)[piece.rows], torch.arange(n)[piece.keys]
        assert len(rows) > 0
        assert len(keys) > 0 or piece.shape == "ragged"
        assert piece.shape != "staircase" or len(rows) // piece.tiles <= chunk
        for tile_rows, tile_keys in zip(rows.chunk(piece.tiles), keys.chunk(piece.tiles), strict=True):
            part = torch.ones(len(tile_rows), len(tile_keys), dtype=torch.int)
            part = {
                "staircase": lambda part: dense_mask(BlockCausal(piece.block), len(part)).int(),  # noqa: B023
                "causal": torch.tril,
                "above": lambda part: part.triu(1),
            }.get(piece.shape, lambda part: part)(part)
            seen[tile_rows[:, None], tile_keys] += part
    assert torch.equal(seen, dense_mask(BlockCausal(block, prefix), n).int())


def test_flops_are_those_of_the_pairs_that_see_each_other():
    q = torch.randn(2, 3, 301, 8, requires_grad=True)
    mask = BlockCausal(16, prefix=9)
    with FlopCounterMode(display=False) as counter:
        out = attention(q, q, q, mask)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 3 * 8 * dense_mask(mask, 301).sum()
    assert counter.get_total_flops() == 3 * forward


def test_tensors_without_memory_pass():
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            q = torch.empty(2, 4, 301, 8, device=device, requires_grad=True)
            k = torch.empty(2, 2, 301, 8, device=device, requires_grad=True)
            out = attention(q, k, k, BlockCausal(16), backend="flash")
            out.sum().backward()
        assert out.shape == q.grad.shape == (2, 4, 301, 8)
        assert k.grad.shape == k.shape


@pytest.mark.parametrize("n", [70, 512, 520])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0])], ids=["whole", "ragged"])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_lie_in_memory_as_compiled_code_is_told(n, lengths, key_heads, dtype):
    prefix = 0 if lengths is None else 3
    inputs = [torch.randn(2, heads, n, 8, dtype=dtype) for heads in (4, key_heads, key_heads)]
    for block in (16, 300):
        masked = lengths, block, prefix, "torch_cpu"
        out, lse = torch.ops.stpredict.block_causal_attention(*inputs, *masked)
        tensors = [out, *inputs, lengths, out, lse]
        found = torch.ops.stpredict.block_causal_attention_backward(*tensors, *masked[1:])
        with FakeTensorMode() as mode:
            told = torch.ops.stpredict.block_causal_attention_backward(
                *(x if x is None else mode.from_tensor(x) for x in tensors), *masked[1:]
            )
        for ours, theirs in zip(found, told, strict=True):
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_summed_in_fp32(dtype, monkeypatch):
    parts = []

    def placed(x):
        """Where CUDA's kernels put gradients of one sample: as if they were rows of the whole."""
        return x.new_empty(1, 320, 4, 8).transpose(1, 2)[:, :, : x.shape[2]].copy_(x)

    class Watched(kernels.TorchCpu):
        chunk = 16

        def backward(self, *of_piece):
            found = super().backward(*of_piece)
            parts.append(found[0][:, :, -1].float())  # the last row sees all keys, and so is in every piece
            return tuple(placed(x) for x in found)

    monkeypatch.setitem(kernels.KERNELS, "watched", Watched())
    q, k, v = (torch.randn(1, 4, 320, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    block_causal(q, k, v, BlockCausal(16), "watched").square().sum().backward()
    assert len(parts) == 20
    assert torch.equal(q.grad[:, :, -1], sum(parts).to(dtype))


def test_an_output_that_was_overwritten_gives_no_wrong_gradients():
    q = torch.randn(1, 2, 70, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        attention(q, q, q, BlockCausal(16)).mul_(2).sum().backward()


def _gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def test_recomputation_and_compilation_change_nothing():
    q, k, v = (torch.randn(2, 3, 301, 8) for _ in range(3))

    def plain(q, k, v):
        return attention(q.sin(), k, v, BlockCausal(16)) * 2

    expected = _gradients(plain, q, k, v)
    for other in (lambda *x: checkpoint(plain, *x, use_reentrant=False), torch.compile(plain, fullgraph=True)):
        for ours, theirs in zip(_gradients(other, q, k, v), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_autocast_computes_in_its_type():
    q = torch.randn(1, 2, 64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mask in (BlockCausal(16), BlockCausal(16, length=48)):
            assert attention(q, q, q, mask).dtype == torch.bfloat16
            assert attention(q[:, :, -16:], q, q, mask).dtype == torch.bfloat16


def test_operators_are_well_formed():
    inputs = [torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3)]
    _, lse = torch.ops.stpredict.block_causal_attention(*inputs, None, 16, 3, "torch_cpu")
    assert not lse.requires_grad  # it would be differentiated as a constant
    torch.library.opcheck(torch.ops.stpredict.block_causal_attention.default, (*inputs, None, 16, 3, "torch_cpu"))
    torch.library.opcheck(
        torch.ops.stpredict.block_causal_attention.default, (*inputs, torch.tensor([2]), 16, 3, "torch_cpu")
    )
