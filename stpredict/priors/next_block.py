"""NBP's prior: a LLaMA-style transformer that predicts a whole block of tokens at a time.

Token j of block i predicts token j of block i + 1. Attention is bidirectional inside a block and causal
between blocks (Ren et al. 2025, arXiv:2502.07737, fig. 3), so block (1, 1, 1) is next-token prediction.
Blocks of the last latent frames may be smaller than the others (``BlockOrder``). What a video shows stands before it as
a prefix, whose tokens see each other and are seen by all.
Shapes: b batch, n tokens of the sequence, d width, v codebook size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.layers.rotary import rotate, rotation
from stpredict.losses.cross_entropy import Head
from stpredict.priors.block_order import BlockOrder
from stpredict.priors.config import ClassLabels, NextBlockConfig, TextTokens
from stpredict.priors.sight import Sight


@dataclass(frozen=True)
class Inputs:
    """What every layer knows of its inputs: how positions rotate them, who sees whom, and how much of each sample's
    prefix is real, where that differs."""

    rotary: tuple[Tensor, Tensor]
    sight: Sight
    prefix_lengths: Tensor | None


class KeyValueCache:
    """Keys and values of one layer, ``(b, heads, n, head width)``, allocated once; ``length`` tokens are filled."""

    def __init__(self, batch: int, heads: int, tokens: int, head_width: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, tokens, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values; returns all of them so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    def __init__(self, config: NextBlockConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, inputs: Inputs, cache: KeyValueCache | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, k = rotate(q, *inputs.rotary), rotate(k, *inputs.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(rearrange(inputs.sight.attend(q, k, v, inputs.prefix_lengths), "b h n e -> b n (h e)"))


class SwiGLU(nn.Module):
    def __init__(self, config: NextBlockConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: NextBlockConfig):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width, eps=1e-6), Attention(config)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, eps=1e-6), SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, inputs: Inputs, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), inputs, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class NextBlockPrior(nn.Module):
    """Embedding, layers, head; one ``forward`` for training and for decoding block by block with caches.

    The inputs are ``prefix`` tokens, ``start`` inputs (as many as the first block has, where it is predicted), and the
    blocks. ``classes``: of a prior of class labels.
    """

    def __init__(self, config: NextBlockConfig, codebook_size: int, grid: tuple[int, int, int], classes: int = 0):
        super().__init__()
        self.config, self.codebook_size, self.classes = config, codebook_size, classes
        self.order = BlockOrder(grid, config.block)
        self.prefix, self.start = config.prefix, self.order.block_tokens if config.predicts_first_block else 0
        self.hybrid = bool(self.start) and config.conditioning.start == "hybrid"
        self.sight = Sight.of_blocks(self.order.sizes, self.prefix, self.start, self.hybrid, config.attention)
        # Integers, so that casting the model to bf16 leaves them exact; angles are computed in fp32.
        self.register_buffer("positions", self._positions(), persistent=False)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.embedding = nn.Embedding(codebook_size, config.width)
        match config.conditioning:  # the last id is that of the null prefix
            case ClassLabels():
                self.prefix_embedding = nn.Embedding(classes + 1, config.width)
            case TextTokens(vocabulary=vocabulary):
                self.prefix_embedding = nn.Embedding(vocabulary + 1, config.width)
        if self.start:
            self.start_embedding = nn.Embedding(1 if self.hybrid else self.start, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = Head(config.width, codebook_size, bias=False)
        self.apply(self._init)

    def _positions(self) -> Tensor:
        """Of every input: its number, or (t, h, w). The start stands where a block before the first one would, the
        prefix before that, each of its tokens at a time of its own."""
        n = self.prefix + self.start + self.order.tokens
        if self.config.rope_axes == 1:
            return torch.arange(n)[:, None]
        before = torch.zeros(self.prefix, 3, dtype=torch.int64, device=self.order.coordinates.device)
        block_before = torch.tensor([self.order.block[0], 0, 0], device=before.device)
        before[:, 0] = torch.arange(-self.prefix, 0, device=before.device) - block_before[0]
        coordinates = self.order.coordinates
        return torch.cat([before, coordinates[: self.start] - block_before, coordinates])

    def _init(self, module: nn.Module) -> None:
        """Normal, 0.02 at the published width of 1536 and as 1 / sqrt(width) elsewhere, so that a narrow twin starts
        with activations of the same size; what writes into the residual stream is divided by sqrt(its additions)."""
        std = 0.02 * (1536 / self.config.width) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, Attention | SwiGLU):
            last = module.out if isinstance(module, Attention) else module.down
            nn.init.normal_(last.weight, std=std / (2 * self.config.layers) ** 0.5)

    @property
    def first_predicted(self) -> int:
        """The first token of the sequence that is predicted: those of the first block are where there is a start."""
        return 0 if self.start else self.order.sizes[0]

    def forward(
        self,
        ids: Tensor,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
        score_from: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the tokens that follow.

        Training, without caches: whole sequences ``(b, n)`` in block order to logits ``(b, n - first_predicted, v)``
        of the tokens from ``first_predicted`` on. With ``score_from``, instead of logits, of the tokens from number
        ``score_from`` on: their cross-entropy in nats and whether the likeliest is right, fp32 ``(b, n - score_from)``.

        Decoding, with caches: the next whole block ``(b, block)``, or in the first call the whole prompt (which may be
        empty where there is a start), to logits ``(b, next block, v)`` of the block after it. With a hybrid start and
        an empty prompt, the first block's tokens one by one, and then that block.

        ``prefix`` (b, prefix) int64 goes with every sequence, in decoding with the first call; ``prefix_lengths`` (b)
        with every call, where some of its tokens are padding.
        """
        if caches is not None:
            return self._decode(ids, prefix, prefix_lengths, caches)
        used = self.order.tokens - self.order.sizes[-1]
        start = [] if not self.start else [self._started(ids)]
        embedded = torch.cat([*self._prefixed(prefix), *start, self.embedding(ids[:, :used])], dim=1)
        x = self._predicting(self._hidden(embedded, 0, prefix_lengths, [None] * len(self.layers)))
        if score_from is None:
            return self.head(x)
        return self.head(x[:, score_from - self.first_predicted :], ids[:, score_from:])

    def flops(self, score_from: int | None = None) -> int:
        """FLOPs of a training forward of one sequence, a multiply-add counted as two: the matrix products of every
        input, and attention over the pairs that see each other. ``score_from``: as in ``forward``."""
        config, inputs = self.config, self.prefix + self.start + self.order.tokens - self.order.sizes[-1]
        of_layer = config.width * (4 * config.width + 3 * config.mlp_width)
        scored = self.order.tokens - (self.first_predicted if score_from is None else score_from)
        pairs = self.sight.of(0, inputs).pairs
        of_layers = config.layers * (inputs * of_layer + 2 * pairs * config.width)
        return 2 * (of_layers + scored * config.width * self.codebook_size)

    def make_caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches for one decoding of ``batch`` sequences."""
        head_width, inputs = self.config.width // self.config.heads, self.prefix + self.start + self.order.tokens
        like = self.head.weight
        return [KeyValueCache(batch, self.config.heads, inputs, head_width, like) for _ in self.layers]

    def next_inputs(self, done: int) -> int:
        """How many of the first ``done`` tokens are the next inputs in decoding: the last block, or, within the first
        one, the last token."""
        number = self.order.blocks_in(done)
        return self.order.sizes[number - 1] if number else 1

    def _decode(
        self, ids: Tensor, prefix: Tensor | None, prefix_lengths: Tensor | None, caches: list[KeyValueCache]
    ) -> Tensor:
        done, order = caches[0].length, self.order
        embedded = [self.embedding(ids)]
        if not done:
            embedded = [*self._prefixed(prefix), *([self._started(ids)] if self.start else []), *embedded]
        x = torch.cat(embedded, dim=1)
        tokens = done + x.shape[1] - self.prefix - self.start  # of the video, that are in the caches now
        number = order.blocks_in(tokens)
        if tokens > 0:
            new = order.sizes[number - 1]
            whole = number and number < len(order.sizes) and (not done or ids.shape[1] == new)
        elif self.hybrid:
            new, whole = 1, ids.shape[1] == (1 if done else 0)
        else:
            new, whole = self.start, self.start and not done
        if not whole:
            raise ValueError(
                f"got {ids.shape[1]} tokens after {max(0, done - self.prefix - self.start)}: after the prompt give one "
                f"block of {order.block_tokens} at a time"
            )
        x = self._hidden(x, done, prefix_lengths, caches)
        return self.head(x[:, -new:][:, : order.sizes[number]])  # the next block may be smaller

    def _prefixed(self, prefix: Tensor | None) -> list[Tensor]:
        if (0 if prefix is None else prefix.shape[1]) != self.prefix:
            raise ValueError(f"this prior takes a prefix of {self.prefix} tokens")
        return [self.prefix_embedding(prefix)] if self.prefix else []

    def _started(self, ids: Tensor) -> Tensor:
        """The inputs that predict the first block: learned ones, or one and the block's own tokens but the last."""
        learned = self.start_embedding(torch.arange(self.start_embedding.num_embeddings, device=ids.device))
        learned = learned.expand(len(ids), -1, -1)
        return torch.cat([learned, self.embedding(ids[:, : self.start - 1])], dim=1) if self.hybrid else learned

    def _predicting(self, x: Tensor) -> Tensor:
        """Of all inputs, those that predict a token: a block before a smaller one has some that do not."""
        x, sizes = x[:, self.prefix :], self.order.sizes
        if sizes[-1] == sizes[0]:
            return x
        whole = self.start + sizes[0] * sizes.count(sizes[0])
        before = whole - sizes[0] + sizes[-1]  # the last whole block predicts the first smaller one
        return torch.cat([x[:, :before], x[:, whole:]], dim=1)

    def _rotation(self) -> tuple[Tensor, Tensor]:
        """Of all positions, computed once on each device."""
        if self._rotary is None or self._rotary[0].device != self.positions.device:
            self._rotary = rotation(self.positions, self.config.width // self.config.heads)
        return self._rotary

    def _hidden(self, x: Tensor, start: int, prefix_lengths: Tensor | None, caches: list) -> Tensor:
        """Of embedded inputs (b, n, d), of which the first is number ``start``, before the head."""
        stop = start + x.shape[1]
        rotary = tuple(table[start:stop] for table in self._rotation())
        inputs = Inputs(rotary, self.sight.of(start, stop), prefix_lengths)
        x = self.dropout(x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, inputs, cache)
        return self.norm(x)
