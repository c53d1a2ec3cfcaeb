import pytest
import torch

from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw_tokens, uniform_numbers
from stpredict.sampling.next_block import continue_tokens, forward_steps, warm_up


@pytest.fixture(scope="module")
def prior() -> NextBlockPrior:
    torch.manual_seed(0)
    config = NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48, block=(1, 1, 4), dropout=0.0)
    return NextBlockPrior(config, 50, (3, 4, 4)).eval()


def test_given_frames_stay_and_the_rest_is_filled(prior):
    given = torch.randint(50, (2, 1, 4, 4))
    ids = continue_tokens(prior, given, SamplingConfig(), [1, 2])
    assert ids.shape == (2, 3, 4, 4)
    assert torch.equal(ids[:, :1], given)
    assert ids.min() >= 0
    assert ids.max() < 50


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0), SamplingConfig(top_k=40, top_p=0.9)], ids=str)
def test_tokens_are_drawn_from_the_training_pass_each_with_numbers_of_its_own(prior, config):
    given = torch.randint(50, (2, 1, 4, 4))
    sequence = prior.order.to_sequence(continue_tokens(prior, given, config, [5, 6]))
    numbers = uniform_numbers([5, 6], 32, torch.device("cpu"))
    assert torch.equal(sequence[:, 16:], draw_tokens(prior(sequence).detach()[:, 12:], config, numbers))


def test_a_warm_up_stops_after_two_passes_where_nothing_is_recorded(prior):
    given = torch.randint(1, 50, (1, 1, 4, 4))
    ids = warm_up(None, prior, given, SamplingConfig(temperature=0), [0])
    whole = continue_tokens(prior, given, SamplingConfig(temperature=0), [0])
    assert torch.equal(ids.flatten()[: 16 + 8], whole.flatten()[: 16 + 8])
    assert not ids.flatten()[16 + 8 :].any()


@pytest.mark.parametrize("block", [(2, 1, 4), (2, 2, 2)])
def test_frames_behind_the_last_whole_block_are_decoded_too(block):
    torch.manual_seed(0)
    config = NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48, block=block, dropout=0.0)
    prior = NextBlockPrior(config, 50, (5, 4, 4)).eval()
    given = torch.randint(50, (1, 2, 4, 4))
    ids = continue_tokens(prior, given, SamplingConfig(temperature=0), [0])
    sequence = prior.order.to_sequence(ids)
    assert torch.equal(sequence[:, 32:], prior(sequence).argmax(-1)[:, 32 - prior.order.sizes[0] :])


CLASS, TEXT = {"kind": "class"}, {"kind": "text", "tokenizer": "t.json", "vocabulary": 9, "tokens": 4}


def told_prior(conditioning, block=(1, 1, 4)) -> NextBlockPrior:
    torch.manual_seed(0)
    size = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "dropout": 0.0}
    config = NextBlockConfig(**size, block=block, conditioning=conditioning)
    prior = NextBlockPrior(config, 50, (3, 4, 4), classes=3).eval()
    for parameter in prior.parameters():  # larger than the initial weights: what it is told makes a difference
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def told(prior: NextBlockPrior, *rows: int) -> tuple:
    if prior.prefix == 1:
        return torch.tensor(rows)[:, None], None
    return torch.tensor([[row, 1, 2, 3] for row in rows]), torch.tensor([row + 1 for row in rows])


NOTHING = torch.empty(2, 0, 4, 4, dtype=torch.long)
STARTS = [(kind | {"start": start}) for kind in (CLASS, TEXT) for start in ("block", "hybrid")]


@pytest.mark.parametrize("conditioning", STARTS, ids=str)
@pytest.mark.parametrize("block", [(1, 1, 4), (2, 1, 4)])
def test_from_nothing_the_likeliest_tokens_are_those_of_the_training_pass(conditioning, block):
    prior = told_prior(conditioning, block)
    prefix = told(prior, 0, 2)
    ids = continue_tokens(prior, NOTHING, SamplingConfig(temperature=0), [0, 1], prefix)
    sequence = prior.order.to_sequence(ids)
    assert torch.equal(sequence, prior(sequence, *prefix).argmax(-1))
    assert not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("conditioning", STARTS, ids=str)
def test_guidance_moves_the_logits_away_from_those_without_the_prefix(conditioning):
    prior = told_prior(conditioning)
    prefix, null = told(prior, 0, 1), told(prior, 2, 2)
    config = SamplingConfig(temperature=0, guidance=2.5)
    sequence = prior.order.to_sequence(continue_tokens(prior, NOTHING, config, [0, 1], prefix, null))
    with_it, without = prior(sequence, *prefix), prior(sequence, *null)
    assert torch.equal(sequence, (without + 2.5 * (with_it - without)).argmax(-1))
    # 0 forgets the prefix, 1 knows nothing but it.
    for guidance, alone in ((0, null), (1, prefix)):
        config = SamplingConfig(temperature=0, guidance=guidance)
        found = continue_tokens(prior, NOTHING, config, [0, 1], prefix, null)
        assert torch.equal(found, continue_tokens(prior, NOTHING, SamplingConfig(temperature=0), [0, 1], alone))


@pytest.mark.parametrize("conditioning", STARTS, ids=str)
def test_told_samples_depend_on_their_seed_and_prefix_and_not_on_their_batch(conditioning):
    prior, config = told_prior(conditioning), SamplingConfig(top_p=0.9, guidance=1.5)
    together = continue_tokens(prior, NOTHING, config, [7, 8], told(prior, 1, 2), told(prior, 0, 0))
    alone = continue_tokens(prior, NOTHING[:1], config, [8], told(prior, 2), told(prior, 0))
    assert torch.equal(together[1:], alone)
    assert not torch.equal(continue_tokens(prior, NOTHING[:1], config, [9], told(prior, 2), told(prior, 0)), alone)


@pytest.mark.parametrize(("start", "steps"), [("block", 80), ("hybrid", 95)])
def test_forward_passes_from_nothing_are_the_published_ones(start, steps, monkeypatch):
    config = NextBlockConfig(layers=1, width=8, heads=1, mlp_width=8, conditioning={"kind": "none", "start": start})
    prior, calls = NextBlockPrior(config, 50, (5, 16, 16)).eval(), []

    def forward(*args, **kwargs):
        calls.append(1)
        return prior(*args, **kwargs)

    ids = continue_tokens(prior, torch.empty(1, 0, 16, 16).long(), SamplingConfig(), [0], forward=forward)
    assert ids.shape == (1, 5, 16, 16)
    assert len(calls) == forward_steps(prior, 0) == steps
    assert forward_steps(prior, 2) == 48  # two latent frames given, as on Kinetics-600


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(prior):
    given = torch.randint(50, (3, 1, 4, 4))
    together = continue_tokens(prior, given, SamplingConfig(), [7, 8, 9])
    alone = continue_tokens(prior, given[1:2], SamplingConfig(), [8])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(continue_tokens(prior, given[1:2], SamplingConfig(), [9]), alone)


@pytest.mark.parametrize(("block", "frames", "need"), [((1, 1, 4), 3, "1 to 2, in steps of 1"),
                                                       ((1, 1, 4), 0, "1 to 2, in steps of 1"),
                                                       ((2, 1, 4), 1, "1 to 2, in steps of 2")])  # fmt: skip
def test_all_frames_none_and_parts_of_a_block_are_refused(block, frames, need):
    prior = NextBlockPrior(NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48, block=block), 50, (3, 4, 4))
    with pytest.raises(ValueError, match=f"{frames} given latent frames: need {need}"):
        continue_tokens(prior, torch.zeros(1, frames, 4, 4, dtype=torch.long), SamplingConfig(), [0])
