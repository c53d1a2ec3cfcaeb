"""NBP's prior: a LLaMA-style transformer that predicts a whole block of tokens at a time.

Token j of block i predicts token j of block i + 1. Attention is bidirectional inside a block and causal
between blocks (Ren et al. 2025, arXiv:2502.07737, fig. 3), so block (1, 1, 1) is next-token prediction.
Shapes: b batch, n tokens of the sequence, d width, v codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.attention.attention import attention
from stpredict.attention.masks import BlockCausal, Full, Mask
from stpredict.layers.rotary import rotate, rotation
from stpredict.priors.block_order import BlockOrder
from stpredict.priors.config import NextBlockConfig

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

    def forward(self, x: Tensor, rotary: Rotation, mask: Mask, cache: KeyValueCache | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(rearrange(attention(q, k, v, mask), "b h n e -> b n (h e)"))


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

    def forward(self, x: Tensor, rotary: Rotation, mask: Mask, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class NextBlockPrior(nn.Module):
    """Embedding, layers, head; one ``forward`` for training and for decoding block by block with caches."""

    def __init__(self, config: NextBlockConfig, codebook_size: int, grid: tuple[int, int, int]):
        super().__init__()
        self.config, self.codebook_size = config, codebook_size
        self.order = BlockOrder(grid, config.block)
        self.mask = BlockCausal(self.order.block_tokens)
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
        size = self.order.block_tokens
        if caches is None:
            return self._logits(ids[:, :-size], 0, self.mask, [None] * len(self.layers))
        done, new = caches[0].length, ids.shape[1]
        if new % size or (done and new != size):
            raise ValueError(f"got {new} tokens after {done}: after the prompt give one block of {size} at a time")
        # A single block sees all of the cache, and a prompt is a sequence of its own: no other mask is needed.
        return self._logits(ids, done, Full() if done else self.mask, caches)[:, -size:]

    def flops(self) -> int:
        """FLOPs of a training forward of one sequence, a multiply-add counted as two: the matrix products of every
        token, and attention over the pairs that see each other."""
        config, tokens = self.config, self.order.tokens - self.order.block_tokens
        of_layer = config.width * (4 * config.width + 3 * config.mlp_width)
        of_token = config.layers * of_layer + config.width * self.codebook_size
        blocks = tokens // self.order.block_tokens
        pairs = self.order.block_tokens**2 * blocks * (blocks + 1) // 2
        return 2 * (tokens * of_token + config.layers * 2 * pairs * config.width)

    def make_caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches for one decoding of ``batch`` sequences."""
        head_width = self.config.width // self.config.heads
        like = self.head.weight
        return [KeyValueCache(batch, self.config.heads, self.order.tokens, head_width, like) for _ in self.layers]

    def _logits(self, ids: Tensor, start: int, mask: Mask, caches: list) -> Tensor:
        positions = self.positions[start : start + ids.shape[1]]
        rotary = rotation(positions, self.config.width // self.config.heads)
        x = self.dropout(self.embedding(ids))
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, mask, cache)
        return self.head(self.norm(x))
