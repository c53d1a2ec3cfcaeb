"""Every backend against dense softmax attention, forward and backward."""

import itertools

import pytest
import torch

from stpredict.attention.attention import attention
from stpredict.attention.masks import BlockCausal, Causal, Full, Window, pairs, simplest
from stpredict.attention.reference import dense_mask, reference_attention

MASKS = [
    Full(),
    Causal(),
    Window(1),
    Window(40),
    Window(1000),
    BlockCausal(1),
    BlockCausal(8),
    BlockCausal(3, prefix=7),
    BlockCausal(64),
    BlockCausal(200),
    BlockCausal(256, prefix=3),
    BlockCausal(400),
    BlockCausal(16, prefix=130),
    BlockCausal(16, length=277),
    BlockCausal(16, prefix=9, prefix_lengths=torch.tensor([4, 0]), length=290),
    BlockCausal(300, prefix=8, prefix_lengths=torch.tensor([8, 5])),
    BlockCausal(1, prefix=8, prefix_lengths=torch.tensor([0, 1])),
    BlockCausal(5, prefix=301, prefix_lengths=torch.tensor([301, 0])),
]


def tensors(heads=4, key_heads=4, n=301, m=301, d=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, n), (key_heads, m), (key_heads, m), (heads, n)
    return [torch.randn(2, h, length, d, dtype=torch.float64, generator=generator).to(dtype) for h, length in shapes]


def run(function, q, k, v, weight, mask, **options):
    """The output and the gradients of q, k and v."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, mask, **options)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_and_its_gradients_equal_the_dense_reference(mask, key_heads):
    inputs = tensors(key_heads=key_heads)
    for ours, reference in zip(run(attention, *inputs, mask), run(reference_attention, *inputs, mask), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 40, 300])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_fewer_queries_than_keys_are_the_last_of_the_sequence(mask, n):
    inputs = tensors(n=n)
    for ours, reference in zip(run(attention, *inputs, mask), run(reference_attention, *inputs, mask), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, {"rtol": 2e-2, "atol": 3e-2}), (torch.float32, {"rtol": 1e-5, "atol": 1e-4})],
    ids=["bf16", "fp32"],
)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_lower_precision_stays_near_the_reference(mask, dtype, tolerance):
    inputs = tensors(key_heads=2, dtype=dtype)
    exact = run(reference_attention, *(x.double() for x in inputs), mask)
    for ours, reference in zip(run(attention, *inputs, mask), exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), reference, **tolerance)


@pytest.mark.parametrize("mask", [BlockCausal(16), BlockCausal(300)], ids=str)
def test_tensors_may_lie_in_memory_in_any_way(mask):
    q, k, v, weight = (x.mT.contiguous().mT for x in tensors())
    for ours, reference in zip(
        run(attention, q, k, v, weight, mask), run(reference_attention, q, k, v, weight, mask), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_no_mask_is_as_high_as_the_sequence(monkeypatch):
    shapes, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **options):
        shapes.append((0, 0) if attn_mask is None else attn_mask.shape[-2:])
        assert attn_mask is None or attn_mask.any(-1).all()  # kernels may make NaN of a row that sees nothing
        return kernel(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attention(*tensors(n=600, m=601)[:3], Window(200))
    assert max(keys for _, keys in shapes) == 127 + 200
    for mask in (BlockCausal(16, 3), BlockCausal(16, 3, prefix_lengths=torch.tensor([2, 0]))):
        attention(*tensors(n=600, m=601)[:3], mask)
    assert 100 < max(rows for rows, _ in shapes) <= 128
    assert max(keys for rows, keys in shapes if rows) > 500


def test_block_causal_mask_is_what_its_words_say():
    lengths = torch.tensor([1, 2])
    one, two = dense_mask(BlockCausal(block=2, prefix=2, prefix_lengths=lengths, length=7), 8)[:, 0].int().tolist()
    assert one == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert two[1] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert two[6] == [1, 1, 1, 1, 1, 1, 1, 0]


def test_the_simplest_mask_says_the_same():
    masks = [Causal(), *(Window(size) for size in range(1, 9))]
    masks += [BlockCausal(*sizes) for sizes in itertools.product((1, 2, 3, 9), (0, 1, 2))]
    for mask, n in itertools.product(masks, range(1, 8)):
        assert torch.equal(dense_mask(simplest(mask, n, 7), n, 7), dense_mask(mask, n, 7))
    assert simplest(Window(7), 3, 7) == simplest(BlockCausal(1, 1), 3, 7) == Causal()
    assert simplest(BlockCausal(4), 3, 7) == Full()


@pytest.mark.parametrize("mask", [mask for mask in MASKS if getattr(mask, "prefix_lengths", None) is None], ids=str)
def test_pairs_are_counted_as_the_mask_has_them(mask):
    for n in (1, 40, 301):
        assert pairs(mask, n, 301) == dense_mask(mask, n, 301).sum()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (lambda: Window(0), "at least 1"),
        (lambda: BlockCausal(0), "blocks of 0 tokens"),
        (lambda: BlockCausal(1, prefix=-1), "a prefix of -1"),
        (lambda: BlockCausal(1, prefix=2, prefix_lengths=torch.tensor(1)), "one number per sample"),
        (lambda: BlockCausal(1, prefix=2, length=1), "length 1 counts the prefix of 2 too"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, said):
    with pytest.raises(ValueError, match=said):
        mask()


def test_shapes_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 3, 6, 8)
    with pytest.raises(ValueError, match="do not fit each other"):
        attention(q, k, k, Causal())
    for mask in (Causal(), BlockCausal(2), Full()):
        with pytest.raises(ValueError, match="6 queries of 4 keys"):
            attention(q, q[:, :, :4], q[:, :, :4], mask)
    ragged = BlockCausal(2, prefix=2, prefix_lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="prefix_lengths of 2 samples do not fit a batch of 1"):
        attention(q, q, q, ragged)
