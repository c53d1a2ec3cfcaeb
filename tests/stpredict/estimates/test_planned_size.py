"""Parameters and FLOPs against the built model, and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stpredict.attention.masks import BlockCausal
from stpredict.attention.reference import dense_mask
from stpredict.estimates.size import size_of
from stpredict.layers.batch_norm import BatchNorm
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.sight import Part, Sight
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from tests.stpredict.estimates.planned import (
    SMALL_FORECASTER,
    SMALL_PRIOR,
    SMALL_TOKENIZER,
    planned_forecaster,
    planned_prior,
    planned_tokenizer,
)

PUBLISHED = [  # specs of NBP: layers, width, heads, SwiGLU width; 12 L d^2 rounded is 679 M, 1,208 M and 3,624 M
    (24, 1536, 16, 4096),
    (24, 2048, 32, 5504),
    (32, 3072, 32, 8192),
]


def test_the_published_tokenizer_has_its_published_size():
    assert size_of(planned_tokenizer(17, (128, 128))).parameters == 370_372_105


@pytest.mark.parametrize(("layers", "width", "heads", "mlp_width"), PUBLISHED)
def test_the_published_priors_have_the_sizes_that_their_shapes_give(layers, width, heads, mlp_width):
    planned = planned_prior((5, 16, 16), 64_000, layers=layers, width=width, heads=heads, mlp_width=mlp_width)
    of_layer = 4 * width**2 + 3 * width * mlp_width + 2 * width
    size = size_of(planned)
    assert size.parameters == layers * of_layer + width + 2 * 64_000 * width
    assert size.embedding_parameters == 64_000 * width
    assert size.tokens == 1280


def test_sizes_are_those_of_models_that_are_really_built():
    prior, tokenizer = planned_prior(**SMALL_PRIOR), planned_tokenizer(**SMALL_TOKENIZER)
    built = NextBlockPrior(prior.config.model, 64, (4, 8, 8)), CausalCnnTokenizer(tokenizer.config.model)
    for planned, model in zip((prior, tokenizer), built, strict=True):
        assert size_of(planned).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("block", [(1, 1, 1), (1, 1, 8), (1, 8, 8), (2, 2, 2), (2, 8, 8)])
def test_a_priors_attention_counts_by_the_share_of_the_pairs_that_see_each_other(block):
    planned = planned_prior(**{**SMALL_PRIOR, "block": block})
    model, of_block = planned.task.model.to("meta"), block[0] * block[1] * block[2]
    n = 256 - of_block
    model.sight = Sight(0, (Part(0, n, n, 0),))  # everybody sees all
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 256, dtype=torch.int64, device="meta"))
    attention = 2 * 2 * 2 * n * n * 64  # layers, products, FLOPs per multiply-add
    share = dense_mask(BlockCausal(of_block), n).double().mean().item()
    expected = counter.get_total_flops() - attention + attention * share
    assert size_of(planned_prior(**{**SMALL_PRIOR, "block": block})).flops_forward == pytest.approx(expected, rel=0.01)


def test_a_tokenizers_flops_are_torchs():
    planned = planned_tokenizer(**SMALL_TOKENIZER)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        planned.task.model.encoder(torch.empty(1, 3, 9, 32, 32, device="meta"))
        planned.task.model.decoder(torch.empty(1, 6, 5, 8, 8, device="meta"))
    assert size_of(planned).flops_forward == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_backward_costs_two_forwards_but_for_the_gradient_of_what_is_data():
    prior = planned_prior(**SMALL_PRIOR).task.model.to("meta")
    forward, whole = FlopCounterMode(display=False), FlopCounterMode(display=False)
    sequence = torch.empty(1, 256, dtype=torch.int64, device="meta")
    with forward, torch.no_grad():
        prior(sequence)
    with whole:
        prior(sequence).sum().backward()
    assert whole.get_total_flops() == 3 * forward.get_total_flops()

    tokenizer = planned_tokenizer(17, (128, 128))
    model = tokenizer.task.model
    counter = FlopCounterMode(display=False)
    with counter:
        z = model.encoder(torch.empty(1, 3, 17, 128, 128, device="meta"))
        model.decoder(z).sum().backward()
    size = size_of(tokenizer)
    assert counter.get_total_flops() == pytest.approx(size.flops_forward + size.flops_backward, rel=0.002)
    assert counter.get_total_flops() < size.flops_forward + size.flops_backward


def test_a_forecasters_flops_are_torchs_of_all_passes_and_its_multiply_adds_those_of_one_with_norms():
    planned = planned_forecaster(output_frames=10)
    model = planned.task.model.to("meta").eval()
    counter, values = FlopCounterMode(display=False), []
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm | BatchNorm):
            weight = 2 if isinstance(module, BatchNorm) else 5
            module.register_forward_hook(lambda _, args, out, weight=weight: values.append(weight * out.numel()))
    with counter, torch.no_grad():
        model(torch.empty(1, 1, 4, 16, 16, device="meta"))
    size = size_of(planned_forecaster(output_frames=10))
    assert size.tokens == 0
    assert size.flops_forward == counter.get_total_flops()
    assert size.macs_forward == pytest.approx((counter.get_total_flops() / 2 + sum(values)) / 3)
    assert size.macs_forward == size_of(planned_forecaster(output_frames=4)).macs_forward


def test_multiply_adds_with_svq_are_those_of_its_products_written_out():
    quantizer = {"kind": "svq", "codebook_size": 500, "hidden": 16}
    without, with_svq = size_of(planned_forecaster()), size_of(planned_forecaster(quantizer=quantizer))
    locations, width = 4 * 8 * 8, SMALL_FORECASTER["hid_S"]
    written_out = locations * (width * 16 + 16 * 500 + 500 * width)
    assert with_svq.macs_forward - without.macs_forward == pytest.approx(written_out)
    assert with_svq.flops_forward - without.flops_forward < written_out / 10


@pytest.mark.parametrize(
    ("data", "channels", "dtype"),
    [
        ({}, 1, torch.uint8),
        ({}, 3, torch.uint8),
        ({}, 2, torch.float32),
        ({"scaling": {"kind": "standard"}}, 1, torch.float32),
        ({"scaling": {"kind": "unit"}}, 1, torch.uint8),
    ],
)
def test_a_forecasters_batch_is_bytes_of_video_or_floats_of_fields(data, channels, dtype):
    clip = planned_forecaster(data=data, channels=channels).batch(3)["clip"]
    assert (clip.dtype, tuple(clip.shape)) == (dtype, (3, 8, 16, 16, channels))
