import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior

GRID = (3, 4, 4)
# In the last five, the latent frames are not whole blocks; blocks are in order of time all the same.
SHAPES = [(1, 1, 1), (1, 1, 4), (1, 2, 2), (1, 4, 4), (3, 1, 2), (2, 1, 4), (2, 2, 2), (2, 1, 1), (2, 4, 4), (3, 1, 4)]
# Three blocks of 12 tokens, which are no multiple of the 8 in each of the smaller blocks behind them.
GRIDS = {(3, 1, 4): (5, 3, 4)}


# Of what stands before the first block, every kind.
NONE = {"kind": "none"}
CLASS = {"kind": "class"}
TEXT = {"kind": "text", "tokenizer": "tokenizer.json", "vocabulary": 20, "tokens": 5}
HYBRID = {"start": "hybrid"}
KINDS = [{"kind": "frames"}, NONE, NONE | HYBRID, CLASS, CLASS | HYBRID, TEXT, TEXT | HYBRID]


def prior(block=(1, 1, 4), rope_axes=3, conditioning=KINDS[0]) -> NextBlockPrior:
    torch.manual_seed(0)
    size = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "dropout": 0.0}
    config = NextBlockConfig(**size, block=block, rope_axes=rope_axes, conditioning=conditioning)
    model = NextBlockPrior(config, 50, GRIDS.get(block, GRID), classes=3).double().eval()
    for parameter in model.parameters():  # larger than the initial weights, so that a leak would be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prefix_of(model: NextBlockPrior, samples: int = 1) -> tuple:
    """Prefix and lengths, of which the first is the whole prefix, and the others less."""
    if not model.prefix:
        return (None, None)
    ids = torch.randint(3, (samples, model.prefix), generator=torch.Generator().manual_seed(2))
    return ids, torch.tensor([5, 3, 1][:samples]) if model.prefix > 1 else None


def seen(model: NextBlockPrior, number: int, token: int) -> bool:
    """Whether the prediction of token ``number`` may depend on ``token``: block by block, or, within the first block
    of a hybrid start, token by token."""
    block_of = [block for block, size in enumerate(model.order.sizes) for _ in range(size)]
    if model.hybrid and number < model.start:
        return token < number
    return block_of[token] < block_of[number]


@pytest.mark.parametrize("conditioning", KINDS, ids=str)
@pytest.mark.parametrize("block", SHAPES)
def test_a_prediction_sees_all_blocks_before_its_own_and_nothing_else(block, conditioning):
    model = prior(block, conditioning=conditioning)
    sequence = torch.randint(50, (1, model.order.tokens), generator=torch.Generator().manual_seed(1))
    logits = model(sequence, *prefix_of(model))
    predicted = range(model.first_predicted, model.order.tokens)
    assert logits.shape == (1, len(predicted), 50)
    for token in {0, model.order.sizes[0] - 1, 19, model.order.ends[len(model.order.ends) // 2] - 1, 46}:
        other = sequence.clone()
        other[0, token] = (other[0, token] + 1) % 50
        difference = (model(other, *prefix_of(model)) - logits).abs().amax(-1)[0]
        assert [bool(d > 0) for d in difference] == [seen(model, number, token) for number in predicted]


@pytest.mark.parametrize("conditioning", [TEXT, TEXT | HYBRID], ids=str)
@pytest.mark.parametrize("block", [(1, 1, 4), (2, 1, 4)])
def test_every_prediction_sees_the_prefix_and_none_its_padding(block, conditioning):
    model = prior(block, conditioning=conditioning)
    sequence = torch.randint(50, (3, model.order.tokens))
    ids, lengths = prefix_of(model, 3)
    logits = model(sequence, ids, lengths)
    for token in range(model.prefix):
        other = ids.clone()
        other[:, token] += 5
        differ = (model(sequence, other, lengths) - logits).abs().amax(-1) > 0
        for sample, length in enumerate(lengths.tolist()):
            assert bool(differ[sample].all()) == bool(differ[sample].any()) == (token < length)


@pytest.mark.parametrize("block", SHAPES)
def test_a_ragged_prefix_is_one_of_its_own_length(block):
    model, short = prior(block, 1, TEXT), prior(block, 1, TEXT | {"tokens": 3})
    short.load_state_dict(model.state_dict())
    # Positions count from the whole prefix: the same ones for what follows it.
    short.positions = torch.cat([model.positions[:3], model.positions[5:]])
    sequence, ids = torch.randint(50, (2, model.order.tokens)), torch.randint(20, (2, 5))
    found = model(sequence, ids, torch.tensor([5, 3]))
    torch.testing.assert_close(found[1:], short(sequence[1:], ids[1:, :3]), rtol=0, atol=1e-10)


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
        of=lambda *_: SimpleNamespace(attend=lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, allowed))
    )
    expected = longer(longer.order.to_sequence(padded))[:, real[size:]]
    torch.testing.assert_close(model(sequence), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("conditioning", KINDS, ids=str)
@pytest.mark.parametrize("block", SHAPES)
def test_cached_decoding_equals_the_training_pass(block, conditioning):
    model = prior(block, len(conditioning) % 2 * 2 + 1, conditioning)
    sequence = torch.randint(50, (2, model.order.tokens))
    prefix, lengths = prefix_of(model, 2)
    full = model(sequence, prefix, lengths)
    sizes, ends = model.order.sizes, model.order.ends
    for given in {0 if model.start else 1, max(1, len(sizes) // 3)}:
        caches = model.make_caches(2)
        done = ends[given - 1] if given else 0
        found = [model(sequence[:, :done], prefix, lengths, caches=caches)]
        while (end := done + sum(logits.shape[1] for logits in found)) < model.order.tokens:
            new = sequence[:, end - model.next_inputs(end) : end]
            found.append(model(new, prefix_lengths=lengths, caches=caches))
        expected = full[:, done - model.first_predicted :]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("conditioning", [KINDS[0], TEXT], ids=str)
@pytest.mark.parametrize("score_from", [None, 16, 32])
def test_scores_are_those_of_the_logits(conditioning, score_from):
    model = prior((2, 1, 4), conditioning=conditioning)
    sequence, prefix = torch.randint(50, (2, 48)), prefix_of(model, 2)
    first = model.first_predicted if score_from is None else score_from
    logits, targets = model(sequence, *prefix)[:, first - model.first_predicted :], sequence[:, first:]
    loss, right = model(sequence, *prefix, score_from=first)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(right > 0, logits.argmax(-1) == targets)


def test_a_prefix_of_another_length_is_refused():
    with pytest.raises(ValueError, match="takes a prefix of 5 tokens"):
        prior(conditioning=TEXT)(torch.zeros(1, 48, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="takes a prefix of 0 tokens"):
        prior()(torch.zeros(1, 48, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))


def test_decoding_refuses_part_of_a_block_and_two_blocks_at_once():
    model = prior()
    caches = model.make_caches(1)
    with pytest.raises(ValueError, match="got 3 tokens after 0"):
        model(torch.zeros(1, 3, dtype=torch.long), caches=caches)
    model(torch.zeros(1, 8, dtype=torch.long), caches=caches)
    with pytest.raises(ValueError, match="got 8 tokens after 8"):
        model(torch.zeros(1, 8, dtype=torch.long), caches=caches)
    caches = model.make_caches(1)
    model(torch.zeros(1, 44, dtype=torch.long), caches=caches)
    with pytest.raises(ValueError, match="got 4 tokens after 44"):  # the last block, which nothing follows
        model(torch.zeros(1, 4, dtype=torch.long), caches=caches)
    model = prior(conditioning=NONE | HYBRID)
    caches = model.make_caches(1)
    with pytest.raises(ValueError, match="got 1 tokens after 0"):  # part of the first block
        model(torch.zeros(1, 1, dtype=torch.long), caches=caches)
    model(torch.zeros(1, 0, dtype=torch.long), caches=caches)
    with pytest.raises(ValueError, match="got 2 tokens after 0"):  # two of its tokens at once
        model(torch.zeros(1, 2, dtype=torch.long), caches=caches)
    model = prior(conditioning=NONE)
    caches = model.make_caches(1)
    model(torch.zeros(1, 0, dtype=torch.long), caches=caches)
    with pytest.raises(ValueError, match="got 0 tokens after 0"):  # the start once more
        model(torch.zeros(1, 0, dtype=torch.long), caches=caches)


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


def test_a_start_stands_a_block_before_the_first_and_the_prefix_before_that():
    model = prior((2, 1, 4), conditioning=TEXT)
    prefix, start, video = model.positions.split([5, 8, 48])
    assert prefix.tolist() == [[t, 0, 0] for t in range(-7, -2)]
    assert torch.equal(start, model.order.coordinates[:8] - torch.tensor([2, 0, 0]))
    assert torch.equal(video, model.order.coordinates)


def test_positions_stay_exact_when_the_model_is_cast():
    model = NextBlockPrior(NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48), 10, (2, 16, 16)).bfloat16()
    assert model.positions.dtype == torch.int64


def test_dropout_falls_on_the_embedding_and_on_all_that_a_layer_adds():
    config = NextBlockConfig(layers=2, width=32, heads=2, mlp_width=48, block=(1, 1, 4), dropout=0.3)
    model, calls = NextBlockPrior(config, 50, GRID), Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.3
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(torch.zeros(1, 48, dtype=torch.long))
    assert calls == {"dropout": 1, "layers.0.dropout": 2, "layers.1.dropout": 2}


@pytest.mark.parametrize("width", [96, 384])
def test_weights_begin_as_wide_as_published_and_what_is_added_less_with_depth(width):
    model = NextBlockPrior(NextBlockConfig(layers=8, width=width, heads=2, mlp_width=256), 1000, (1, 16, 16))
    published = 0.02 * math.sqrt(1536 / width)
    layer = model.layers[3]
    for weight in (model.embedding.weight, model.head.weight, layer.attention.qkv.weight, layer.mlp.gate_up.weight):
        assert weight.std().item() == pytest.approx(published, rel=0.05)
    for weight in (layer.attention.out.weight, layer.mlp.down.weight):  # 16 additions
        assert weight.std().item() == pytest.approx(published / 4, rel=0.05)
