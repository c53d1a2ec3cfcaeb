"""Semi-autoregressive decoding: one block of tokens per forward pass, with a key/value cache."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw_tokens, uniform_numbers
from stpredict.sampling.recording import Recording, Unrecorded


@torch.no_grad()
def continue_tokens(
    prior: NextBlockPrior,
    given: Tensor,
    config: SamplingConfig,
    seeds: Sequence[int],
    forward: Callable[..., Tensor] | None = None,
    recording: Recording | None = None,
) -> Tensor:
    """Token ids ``(b, t, H', W')`` of the first latent frames to the whole grid ``(b, T', H', W')``.

    ``seeds`` has one seed per sample, so that a sample does not depend on the batch it was drawn in. ``forward``
    calls the prior where that takes more than calling it (a DeepSpeed engine around it, for example). On CUDA, a
    ``recording`` makes the third and later calls with the same prior, config and shapes fast.
    ValueError where the given frames are not whole blocks.
    """
    order = prior.order
    batch, frames = given.shape[:2]
    if frames % order.block[0] or not 0 < frames < order.grid[0]:
        raise ValueError(f"{frames} given latent frames: need 1 to {order.grid[0] - 1}, in steps of {order.block[0]}")
    # The blocks of the given frames come first in block order, so any filling of the others leaves them there.
    padded = given.new_zeros(batch, *order.grid)
    padded[:, :frames] = given
    done = frames * order.grid[1] * order.grid[2]

    steps = recording or Unrecorded()
    sequence = steps.keep("sequence", order.to_sequence(padded))
    uniform = steps.keep("uniform", uniform_numbers(seeds, order.tokens - done, given.device))
    caches = steps.keep_caches(lambda: prior.make_caches(batch))

    def step(new: slice) -> int:
        """Draws the tokens that follow the inputs ``new``; returns how many."""
        logits = (forward or prior)(sequence[:, new], caches=caches)
        drawn = slice(new.stop, new.stop + logits.shape[1])
        sequence[:, drawn] = draw_tokens(logits, config, uniform[:, drawn.start - done : drawn.stop - done])
        return logits.shape[1]

    at = done + step(slice(0, done))  # not recorded: it takes more kinds of attention than the others
    while at < order.tokens:
        last_block = order.sizes[order.blocks_in(at) - 1]
        at += steps.run(at, partial(step, slice(at - last_block, at)))
    return order.to_grid(sequence)
