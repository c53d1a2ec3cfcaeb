"""Semi-autoregressive decoding: one block of tokens per forward pass, with a key/value cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw_tokens, uniform_numbers


@torch.no_grad()
def continue_tokens(
    prior: NextBlockPrior,
    given: Tensor,
    config: SamplingConfig,
    seeds: Sequence[int],
    forward: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Token ids ``(b, t, H', W')`` of the first latent frames to the whole grid ``(b, T', H', W')``.

    ``seeds`` has one seed per sample, so that a sample does not depend on the batch it was drawn in. ``forward``
    calls the prior where that takes more than calling it (a DeepSpeed engine around it, for example).
    ValueError where the given frames are not whole blocks.
    """
    order = prior.order
    batch, frames = given.shape[:2]
    if frames % order.block[0] or not 0 < frames < order.grid[0]:
        raise ValueError(f"{frames} given latent frames: need 1 to {order.grid[0] - 1}, in steps of {order.block[0]}")
    # The blocks of the given frames come first in block order, so any filling of the others leaves them there.
    padded = given.new_zeros(batch, *order.grid)
    padded[:, :frames] = given
    sequence = order.to_sequence(padded)
    start = frames * order.grid[1] * order.grid[2]

    caches = prior.make_caches(batch)
    block = sequence[:, :start]
    sizes = order.sizes[order.blocks_in(start) :]
    for size, uniform in zip(sizes, uniform_numbers(seeds, sum(sizes), given.device).split(sizes, 1), strict=True):
        logits = (forward or prior)(block, caches=caches)
        block = sequence[:, start : start + size] = draw_tokens(logits, config, uniform)
        start += size
    return order.to_grid(sequence)
