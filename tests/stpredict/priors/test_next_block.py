from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior

GRID = (3, 4, 4)
# In the last four, three latent frames are not whole blocks; blocks are in order of time all the same.
SHAPES = [(1, 1, 1), (1, 1, 4), (1, 2, 2), (1, 4, 4), (3, 1, 2), (2, 1, 4), (2, 2, 2), (2, 1, 1), (2, 4, 4)]


def prior(block=(1, 1, 4), rope_axes=3) -> NextBlockPrior:
    torch.manual_seed(0)
    config = NextBlockConfig(layers=2, width=32, heads=2, mlp_width=48, block=block, rope_axes=rope_axes, dropout=0.0)
    model = NextBlockPrior(config, 50, GRID).double().eval()
    for parameter in model.parameters():  # larger than the initial weights, so that a leak would be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("block", SHAPES)
def test_a_token_sees_its_whole_block_and_no_later_one(block):
    model = prior(block)
    sizes, ends = model.order.sizes, model.order.ends
    sequence = torch.randint(50, (1, model.order.tokens), generator=torch.Generator().manual_seed(1))
    logits = model(sequence)
    predicted_by = [number for number, size in enumerate(sizes[1:]) for _ in range(size)]
    for changed_block in {0, len(sizes) // 2, len(sizes) - 2} - {len(sizes) - 1}:
        last = ends[changed_block] - 1  # the last token of a block
        other = sequence.clone()
        other[0, last] = (other[0, last] + 1) % 50
        difference = (model(other) - logits).abs().amax(-1)[0]
        assert [bool(d > 0) for d in difference] == [number >= changed_block for number in predicted_by]


@pytest.mark.parametrize("block", [(2, 1, 4), (2, 2, 2), (2, 1, 1), (2, 4, 4)])
def test_padding_is_as_if_it_were_there_and_nobody_saw_it(block):
    model = prior(block)
    t, h, w = block
    ids = torch.randint(50, (2, *GRID))
    sequence = model.order.to_sequence(ids)
    # The grid padded to four latent frames with a code of its own, and attention told to leave it out.
    longer = NextBlockPrior(model.config, 50, (4, 4, 4)).double().eval()
    longer.load_state_dict(model.state_dict())
    padded = torch.full((2, 4, 4, 4), 7)
    padded[:, :3] = ids
    real = longer.order.coordinates[:, 0] < 3
    n, size = 64 - t * h * w, t * h * w
    number = torch.arange(n) // size
    allowed = (number[:, None] >= number) & real[:n]
    longer.sight = SimpleNamespace(
        of=lambda rows: SimpleNamespace(attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, allowed))
    )
    expected = longer(longer.order.to_sequence(padded))[:, real[size:]]
    torch.testing.assert_close(model(sequence), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize("rope_axes", [1, 3])
def test_cached_decoding_equals_the_training_pass(block, rope_axes):
    model = prior(block, rope_axes)
    sizes, ends = model.order.sizes, model.order.ends
    sequence = torch.randint(50, (2, model.order.tokens))
    full = model(sequence)
    given = max(1, len(sizes) // 3)
    caches = model.make_caches(2)
    step = [model(sequence[:, : ends[given - 1]], caches=caches)]
    blocks = sequence.split(sizes, dim=1)
    step += [model(block, caches=caches) for block in blocks[given:-1]]
    torch.testing.assert_close(torch.cat(step, dim=1), full[:, ends[given - 1] - sizes[0] :], rtol=0, atol=1e-10)


def test_decoding_refuses_part_of_a_block_and_two_blocks_at_once():
    model = prior()
    caches = model.make_caches(1)
    with pytest.raises(ValueError, match="got 3 tokens after 0"):
        model(torch.zeros(1, 3, dtype=torch.long), caches=caches)
    model(torch.zeros(1, 8, dtype=torch.long), caches=caches)
    with pytest.raises(ValueError, match="got 8 tokens after 8"):
        model(torch.zeros(1, 8, dtype=torch.long), caches=caches)


@pytest.mark.parametrize(
    ("size", "blocks", "total"),
    [
        ({"layers": 24, "width": 1536, "heads": 16, "mlp_width": 4096}, 679e6, 876e6),
        ({"layers": 24, "width": 2048, "heads": 32, "mlp_width": 5504}, 1208e6, 1470e6),
        ({"layers": 32, "width": 3072, "heads": 32, "mlp_width": 8192}, 3624e6, 4017e6),
    ],
    ids=["XL", "XXL", "3B"],
)
def test_published_sizes_within_one_percent(size, blocks, total):
    with torch.device("meta"):
        model = NextBlockPrior(NextBlockConfig(**size), 64_000, (5, 16, 16))
    in_layers = sum(p.numel() for p in model.layers.parameters())
    assert in_layers == pytest.approx(blocks, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.01)


def test_positions_stay_exact_when_the_model_is_cast():
    model = NextBlockPrior(NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48), 10, (2, 16, 16)).bfloat16()
    assert model.positions.dtype == torch.int64
