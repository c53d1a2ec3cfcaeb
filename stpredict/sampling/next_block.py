"""Semi-autoregressive decoding: one block of tokens per forward pass, with a key/value cache."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw_tokens, uniform_numbers
from stpredict.sampling.recording import Recording, Unrecorded

#: ``prefix`` and ``prefix_lengths`` of the prior's forward, a row per sample.
Prefix = tuple[Tensor, Tensor | None]


@torch.no_grad()
def continue_tokens(
    prior: NextBlockPrior,
    given: Tensor,
    config: SamplingConfig,
    seeds: Sequence[int],
    prefix: Prefix | None = None,
    null: Prefix | None = None,
    forward: Callable[..., Tensor] | None = None,
    recording: Recording | None = None,
    passes: int | None = None,
) -> Tensor:
    """Token ids ``(b, t, H', W')`` of the first latent frames to the whole grid ``(b, T', H', W')``.

    ``seeds`` has one seed per sample, so that a sample does not depend on the batch it was drawn in. ``prefix`` goes
    with a prior that takes one, and ``null``, the prefix of no class, with ``config.guidance`` other than 1 (Ho &
    Salimans 2022, arXiv:2207.12598): a forward pass then computes both. ``forward`` calls the prior where that takes
    more than calling it (a DeepSpeed engine around it, for example). On CUDA, a ``recording`` makes the third and later
    calls with the same prior, config and shapes fast. Where ``passes`` says after how many forward passes to stop, ids
    that were not drawn by then are 0.
    ValueError where the given frames are not whole blocks, or are none and the prior needs some.
    """
    order = prior.order
    batch, frames = given.shape[:2]
    least = 0 if prior.start else 1
    if frames % order.block[0] or not least <= frames < order.grid[0]:
        raise ValueError(
            f"{frames} given latent frames: need {least} to {order.grid[0] - 1}, in steps of {order.block[0]}"
        )
    # The blocks of the given frames come first in block order, so any filling of the others leaves them there.
    padded = given.new_zeros(batch, *order.grid)
    padded[:, :frames] = given
    done = frames * order.grid[1] * order.grid[2]

    guided = prefix is not None and config.guidance != 1
    copies = 2 if guided else 1
    ids, lengths = _both(prefix, null) if guided else prefix or (None, None)

    steps = recording or Unrecorded()
    sequence = steps.keep("sequence", order.to_sequence(padded))
    uniform = steps.keep("uniform", uniform_numbers(seeds, order.tokens - done, given.device))
    caches = steps.keep_caches(lambda: prior.make_caches(copies * batch))
    if lengths is not None:
        lengths = steps.keep("prefix_lengths", lengths.clone())

    def step(new: slice, prefix: Tensor | None = None) -> int:
        """Draws the tokens that follow the inputs ``new``; returns how many."""
        logits = (forward or prior)(sequence[:, new].repeat(copies, 1), prefix, lengths, caches=caches)
        if guided:
            with_it, without = logits.float().chunk(2)
            logits = without + config.guidance * (with_it - without)
        drawn = slice(new.stop, new.stop + logits.shape[1])
        sequence[:, drawn] = draw_tokens(logits, config, uniform[:, drawn.start - done : drawn.stop - done])
        return logits.shape[1]

    at = done + step(slice(0, done), ids)  # not recorded: it takes more kinds of attention than the others
    passed = 1
    while at < order.tokens and passed != passes:
        at += steps.run(at, partial(step, slice(at - prior.next_inputs(at), at)))
        passed += 1
    return order.to_grid(sequence)


def warm_up(recording: Recording | None, *arguments: Any) -> Tensor:
    """``continue_tokens(*arguments)`` before a clock starts: the first forward passes of a process are slow, since
    kernels are loaded and chosen, memory is found and steps are recorded. Without a ``recording`` two of them do."""
    if recording:
        continue_tokens(*arguments, recording=recording)  # the next one records
    return continue_tokens(*arguments, recording=recording, passes=None if recording else 2)


def forward_steps(prior: NextBlockPrior, given_latent_frames: int) -> int:
    """Forward passes that ``continue_tokens`` takes."""
    done = given_latent_frames * prior.order.grid[1] * prior.order.grid[2]
    of_blocks = len(prior.order.sizes) - prior.order.blocks_in(done)
    return of_blocks + (prior.start - 1 if prior.hybrid and not done else 0)


def _both(prefix: Prefix, null: Prefix) -> Prefix:
    """With and without, one after another."""
    (ids, lengths), (null_ids, null_lengths) = prefix, null
    return torch.cat([ids, null_ids]), None if lengths is None else torch.cat([lengths, null_lengths])
