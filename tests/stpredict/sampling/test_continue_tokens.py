import pytest
import torch

from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.next_block import continue_tokens


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


def test_the_likeliest_tokens_are_those_of_the_training_pass(prior):
    given = torch.randint(50, (1, 1, 4, 4))
    ids = continue_tokens(prior, given, SamplingConfig(temperature=0), [0])
    sequence = prior.order.to_sequence(ids)
    likeliest = prior(sequence).argmax(-1)
    assert torch.equal(sequence[:, 16:], likeliest[:, 12:])


@pytest.mark.parametrize("block", [(2, 1, 4), (2, 2, 2)])
def test_frames_behind_the_last_whole_block_are_decoded_too(block):
    torch.manual_seed(0)
    config = NextBlockConfig(layers=1, width=32, heads=2, mlp_width=48, block=block, dropout=0.0)
    prior = NextBlockPrior(config, 50, (5, 4, 4)).eval()
    given = torch.randint(50, (1, 2, 4, 4))
    ids = continue_tokens(prior, given, SamplingConfig(temperature=0), [0])
    sequence = prior.order.to_sequence(ids)
    assert torch.equal(sequence[:, 32:], prior(sequence).argmax(-1)[:, 32 - prior.order.sizes[0] :])


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(prior):
    given = torch.randint(50, (3, 1, 4, 4))
    together = continue_tokens(prior, given, SamplingConfig(), [7, 8, 9])
    alone = continue_tokens(prior, given[1:2], SamplingConfig(), [8])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(continue_tokens(prior, given[1:2], SamplingConfig(), [9]), alone)


def test_all_frames_given_is_refused(prior):
    with pytest.raises(ValueError, match="3 given latent frames: need 1 to 2"):
        continue_tokens(prior, torch.zeros(1, 3, 4, 4, dtype=torch.long), SamplingConfig(), [0])
