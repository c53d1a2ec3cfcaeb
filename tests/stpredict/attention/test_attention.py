"""Kernels against dense softmax attention in fp64, forward and backward."""

import pytest
import torch

from stpredict.attention.attention import attention
from stpredict.attention.masks import BlockCausal, Causal, Full
from stpredict.attention.reference import dense_mask, reference_attention

MASKS = [
    Full(),
    Causal(),
    BlockCausal(1),
    BlockCausal(8),
    BlockCausal(3, prefix=7),
    BlockCausal(64),
    BlockCausal(200),
    BlockCausal(16, prefix=130),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_and_its_gradients_equal_the_dense_reference(mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 301, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    weight = torch.randn(2, 3, 301, 8, dtype=torch.float64, generator=generator)

    def run(function):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, mask)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    for ours, reference in zip(run(attention), run(reference_attention), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_block_causal_mask_is_what_its_words_say():
    allowed = dense_mask(BlockCausal(block=2, prefix=1), 5)
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


def test_causal_masks_refuse_fewer_queries_than_keys():
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8)
    for mask in (Causal(), BlockCausal(2)):
        with pytest.raises(ValueError, match="as many queries as keys, got 4 and 6"):
            attention(q, k, k, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_on_cuda_in_bf16_equals_the_reference(mask):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = (torch.randn(2, 3, 301, 64, device="cuda") for _ in range(3))
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).float()
    torch.testing.assert_close(ours, reference_attention(q, k, v, mask), rtol=0, atol=3e-2)
