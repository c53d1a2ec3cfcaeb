"""CUDA graphs replay kernels on fixed memory and no Python. On a CPU, a tape of the operations stands for the graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from stpredict.priors.config import NextBlockConfig, TextTokens
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling import next_block
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw, probabilities
from stpredict.sampling.next_block import continue_tokens, warm_up
from stpredict.sampling.recording import Recording

SAMPLING = SamplingConfig(top_k=20, top_p=0.9)


class Tape(TorchDispatchMode):
    """Writes down operations with the very tensors they had; ``replay`` does them again, into the same results.

    Operations that a graph cannot hold, because a CPU has to see what they find, are refused.
    """

    def __init__(self):
        super().__init__()
        self.written = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags), operation
        found = operation(*args, **(kwargs or {}))
        self.written.append((operation, args, kwargs or {}, found))
        return found

    def replay(self):
        for operation, args, kwargs, found in self.written:
            places = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)}
            results = [x for x in tree_flatten(found)[0] if torch.is_tensor(x)]
            new = tree_flatten(operation(*args, **kwargs))[0]
            for result, values in zip(results, (x for x in new if torch.is_tensor(x)), strict=True):
                if result.untyped_storage().data_ptr() not in places:  # else a view, or done in place
                    result.copy_(values)


class TapeRecording(Recording):
    steps_recorded = 0

    def _record(self, step):
        before = [cache.keys.clone() for cache in self._caches]
        with Tape() as tape:
            returned = step()
        for cache, keys in zip(self._caches, before, strict=True):
            cache.keys.copy_(keys)  # recording a graph does nothing but record
        self.steps_recorded += 1
        return tape.replay, returned


def prior_of(block: tuple[int, int, int], dtype: torch.dtype = torch.float32, **conditioning) -> NextBlockPrior:
    torch.manual_seed(0)
    config = NextBlockConfig(layers=2, width=32, heads=2, mlp_width=48, block=block, dropout=0.0, **conditioning)
    return NextBlockPrior(config, 50, (3, 4, 4)).to(dtype).eval()


@pytest.mark.parametrize("block", [(1, 1, 4), (1, 1, 1), (1, 4, 4), (2, 2, 2)], ids=str)
def test_recorded_steps_give_the_tokens_of_steps_that_run(block, monkeypatch):
    monkeypatch.setattr(  # as on CUDA
        next_block, "draw_tokens", lambda logits, config, uniform: draw(probabilities(logits, config), uniform[..., 0])
    )
    prior, recording = prior_of(block), TapeRecording()
    found, expected, steps = [], [], []
    for seed in range(4):
        given = torch.randint(50, (2, block[0], 4, 4), generator=torch.Generator().manual_seed(seed))
        seeds = [2 * seed, 2 * seed + 1]
        found.append(continue_tokens(prior, given, SAMPLING, seeds, recording=recording))
        expected.append(continue_tokens(prior, given, SAMPLING, seeds))
        steps.append(recording.steps_recorded)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    blocks = len(prior.order.sizes) - prior.order.blocks_in(block[0] * 16)
    assert steps == [0, *[blocks - 1] * 3]  # the first decoding loads kernels


def test_recorded_steps_read_the_prefixes_of_their_own_batch(monkeypatch):
    """Texts of several lengths and guidance, from no frame."""
    monkeypatch.setattr(
        next_block, "draw_tokens", lambda logits, config, uniform: draw(probabilities(logits, config), uniform[..., 0])
    )
    prior, recording = (
        prior_of((1, 1, 4), conditioning=TextTokens(tokenizer="unread", vocabulary=30, tokens=5)),
        TapeRecording(),
    )
    given, sampling = torch.zeros(2, 0, 4, 4, dtype=torch.long), SamplingConfig(guidance=3.0)
    found, expected = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        told = [
            (torch.randint(31, (2, 5), generator=generator), torch.randint(1, 6, (2,), generator=generator))
            for _ in range(2)
        ]
        found.append(continue_tokens(prior, given, sampling, [0, 1], *told, recording=recording))
        expected.append(continue_tokens(prior, given, sampling, [0, 1], *told))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len(torch.stack(found).flatten(1).unique(dim=0)) == 4


def test_a_warm_up_records_all_steps(monkeypatch):
    monkeypatch.setattr(
        next_block, "draw_tokens", lambda logits, config, uniform: draw(probabilities(logits, config), uniform[..., 0])
    )
    prior, recording = prior_of((1, 1, 4), conditioning={"kind": "none"}), TapeRecording()
    arguments = prior, torch.zeros(2, 0, 4, 4, dtype=torch.long), SAMPLING, [0, 1]
    warm_up(recording, *arguments)
    assert recording.steps_recorded == 11  # of twelve blocks, the first of which nothing but the start predicts
    assert torch.equal(continue_tokens(*arguments, recording=recording), continue_tokens(*arguments))
    assert recording.steps_recorded == 11


def test_a_recording_of_other_shapes_is_refused():
    prior, recording = prior_of((1, 1, 4)), TapeRecording()
    continue_tokens(prior, torch.zeros(2, 1, 4, 4, dtype=torch.long), SAMPLING, [0, 1], recording=recording)
    with pytest.raises(ValueError, match=r"sequence: recorded with shape \(2, 48\), got \(1, 48\)"):
        continue_tokens(prior, torch.zeros(1, 1, 4, 4, dtype=torch.long), SAMPLING, [0], recording=recording)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("block", [(1, 1, 4), (1, 1, 1), (1, 4, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda_graphs_give_the_tokens_of_steps_that_run(block, dtype):
    prior, recording = prior_of(block, dtype).cuda(), Recording()
    for seed in range(4):
        given = torch.randint(50, (2, block[0], 4, 4), generator=torch.Generator().manual_seed(seed)).cuda()
        recorded = continue_tokens(prior, given, SAMPLING, [seed, seed + 9], recording=recording)
        assert torch.equal(recorded, continue_tokens(prior, given, SAMPLING, [seed, seed + 9]))
