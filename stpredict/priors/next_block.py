"""NBP's prior: a LLaMA-style transformer that predicts a whole block of tokens at a time.

Token j of block i predicts token j of block i + 1. Attention is bidirectional inside a block and causal
between blocks (Ren et al. 2025, arXiv:2502.07737, fig. 3), so block (1, 1, 1) is next-token prediction.
Blocks of the last latent frames may be smaller than the others (``BlockOrder``).
Shapes: b batch, n tokens of the sequence, d width, v codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.layers.rotary import rotate, rotation
from stpredict.priors.block_order import BlockOrder
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.sight import Sight

Rotation = tuple[Tensor, Tensor]


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

    def forward(self, x: Tensor, rotary: Rotation, sight: Sight, cache: KeyValueCache | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(rearrange(sight.attend(q, k, v), "b h n e -> b n (h e)"))


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

    def forward(self, x: Tensor, rotary: Rotation, sight: Sight, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, sight, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class NextBlockPrior(nn.Module):
    """Embedding, layers, head; one ``forward`` for training and for decoding block by block with caches."""

    def __init__(self, config: NextBlockConfig, codebook_size: int, grid: tuple[int, int, int]):
        super().__init__()
        self.config, self.codebook_size = config, codebook_size
        self.order = BlockOrder(grid, config.block)
        self.sight = Sight.of_blocks(self.order.sizes, config.attention)
        positions = self.order.coordinates if config.rope_axes == 3 else torch.arange(self.order.tokens)[:, None]
        # Integers, so that casting the model to bf16 leaves them exact; angles are computed in fp32 on use.
        self.register_buffer("positions", positions, persistent=False)
        self.embedding = nn.Embedding(codebook_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, codebook_size, bias=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Normal, 0.02 at the published width of 1536 and as 1 / sqrt(width) elsewhere, so that a narrow twin starts
        with activations of the same size; what writes into the residual stream is divided by sqrt(its additions)."""
        std = 0.02 * (1536 / self.config.width) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, Attention | SwiGLU):
            last = module.out if isinstance(module, Attention) else module.down
            nn.init.normal_(last.weight, std=std / (2 * self.config.layers) ** 0.5)

    def forward(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits of the blocks that follow.

        Training, without caches: whole sequences ``(b, n)`` in block order to logits ``(b, n - block, v)`` of the
        tokens from the second block on. Decoding, with caches: the next whole block ``(b, block)``, or in the
        first call the whole prompt, to logits ``(b, block, v)`` of the block after it.
        """
        if caches is None:
            inputs = self.order.tokens - self.order.sizes[-1]
            x = self._hidden(ids[:, :inputs], 0, [None] * len(self.layers))
            return self.head(self._predicting(x))
        done, new = caches[0].length, ids.shape[1]
        number = self.order.blocks_in(done + new)
        whole = number and (not done or new == self.order.sizes[number - 1])
        if not whole or number == len(self.order.sizes):
            raise ValueError(
                f"got {new} tokens after {done}: after the prompt give one block of {self.order.block_tokens} at a time"
            )
        x = self._hidden(ids, done, caches)
        this, following = self.order.sizes[number - 1 : number + 1]
        return self.head(x[:, -this:][:, :following])

    def flops(self) -> int:
        """FLOPs of a training forward of one sequence, a multiply-add counted as two: the matrix products of every
        token, and attention over the pairs that see each other."""
        config, inputs = self.config, self.order.tokens - self.order.sizes[-1]
        of_layer = config.width * (4 * config.width + 3 * config.mlp_width)
        of_head = config.width * self.codebook_size * (self.order.tokens - self.order.sizes[0])
        pairs = sum(self.sight.limits[:inputs])
        return 2 * (config.layers * (inputs * of_layer + 2 * pairs * config.width) + of_head)

    def make_caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches for one decoding of ``batch`` sequences."""
        head_width = self.config.width // self.config.heads
        like = self.head.weight
        return [KeyValueCache(batch, self.config.heads, self.order.tokens, head_width, like) for _ in self.layers]

    def _predicting(self, x: Tensor) -> Tensor:
        """Of all inputs, those that predict a token: a block before a smaller one has some that do not."""
        sizes = self.order.sizes
        if sizes[-1] == sizes[0]:
            return x
        whole = sum(size for size in sizes if size == sizes[0])
        before = whole - sizes[0] + sizes[-1]  # the last whole block predicts the first smaller one
        return torch.cat([x[:, :before], x[:, whole:]], dim=1)

    def _hidden(self, ids: Tensor, start: int, caches: list) -> Tensor:
        """Of inputs ``ids`` (b, n), of which the first is number ``start`` of the sequence, before the head."""
        rows = slice(start, start + ids.shape[1])
        rotary = rotation(self.positions[rows], self.config.width // self.config.heads)
        sight = self.sight.of(rows)
        x = self.dropout(self.embedding(ids))
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, sight, cache)
        return self.norm(x)
