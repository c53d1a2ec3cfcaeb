"""Long and large videos through a causal tokenizer, part by part.

In time a video goes through in chunks, and every layer keeps the frames that it needs of the chunks before: the result
is that of all at once. In space it goes through in tiles that overlap. Their results are blended: at a tile's edge,
where the network saw replicated pixels instead of the neighbour's, it has no part in the result for a quarter of the
overlap, and a share that grows to 1 over the next half. If nothing of the network reached further than that quarter,
the result would be that of all at once. GroupNorm does, whose statistics are those of the frame it is given: of the
tile's instead of the frame's.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from stpredict.layers.causal_conv import Past
from stpredict.tokenizers.config import CausalCnnConfig, TilingConfig

Network = Callable[[Tensor, Past], Tensor]


def in_chunks(network: Network, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """What an encoder or decoder makes of each chunk ``(b, c, t, h, w)`` of one video, which may be endless.

    An encoder's first chunk has 1 + temporal_factor * n frames, the others a multiple of temporal_factor.
    """
    past: Past = {}
    for chunk in chunks:
        yield network(chunk, past)


def encode_tiles(encoder: Network, video: Tensor, tiling: TilingConfig, config: CausalCnnConfig) -> Tensor:
    """Clip ``(b, c, t, h, w)`` to vectors ``(b, d, t', h', w')``."""
    frames, factor = tiling.latent_frames, config.spatial_factor

    def encode(part: Tensor) -> Tensor:
        if frames is None:
            return encoder(part)
        first = 1 + config.temporal_factor * (frames - 1)
        rest = part[:, :, first:].split(config.temporal_factor * frames, dim=2) if part.shape[2] > first else ()
        return torch.cat([*in_chunks(encoder, (part[:, :, :first], *rest))], dim=2)

    tiles = Tiles(video.shape[-2] // factor, video.shape[-1] // factor, factor, tiling)
    return tiles.blended(encode, video, given=factor, made=1)


def decode_tiles(decoder: Network, z: Tensor, tiling: TilingConfig, config: CausalCnnConfig) -> Tensor:
    """Vectors ``(b, d, t', h', w')`` to a clip ``(b, c, t, h, w)``."""

    def decode(part: Tensor) -> Tensor:
        if tiling.latent_frames is None:
            return decoder(part)
        return torch.cat([*in_chunks(decoder, part.split(tiling.latent_frames, dim=2))], dim=2)

    tiles = Tiles(*z.shape[-2:], config.spatial_factor, tiling)
    return tiles.blended(decode, z, given=1, made=config.spatial_factor)


class Tiles:
    """Of a grid of ``height`` x ``width`` latents, each ``factor`` x ``factor`` pixels; as few as there can be, spread
    evenly, so that neighbours share at least the overlap."""

    def __init__(self, height: int, width: int, factor: int, tiling: TilingConfig):
        sides = (height, width)
        self.sizes = sides
        self.overlap = 0
        if tiling.tile:
            self.sizes = tuple(min(side, tile // factor) for side, tile in zip(sides, tiling.tile, strict=True))
            overlap = min(tiling.tile) // 4 if tiling.overlap is None else tiling.overlap
            self.overlap = overlap // factor
        rows, columns = (_starts(side, size, self.overlap) for side, size in zip(sides, self.sizes, strict=True))
        self.sides, self.places = sides, list(product(rows, columns))

    def blended(self, network: Callable[[Tensor], Tensor], x: Tensor, given: int, made: int) -> Tensor:
        """What ``network`` makes of ``x`` ``(..., h, w)``, tile by tile. A latent is ``given`` x ``given`` places of
        ``x``, and ``made`` x ``made`` of the result."""
        if len(self.places) == 1:
            return network(x)
        total = weights = None
        for place in self.places:
            (top, left), (height, width) = place, self.sizes
            out = network(x[..., top * given : (top + height) * given, left * given : (left + width) * given])
            if total is None:
                total = out.new_zeros(*out.shape[:-2], *(side * made for side in self.sides))
                weights = total.new_zeros(total.shape[-2:])
            weight = self._weight(place, made).to(total)
            here = (..., slice(top * made, (top + height) * made), slice(left * made, (left + width) * made))
            total[here] += weight * out
            weights[here] += weight
        return total / weights

    def _weight(self, place: tuple[int, int], made: int) -> Tensor:
        """Of one tile's result, ``(h, w)``."""
        parts = []
        for start, size, side in zip(place, self.sizes, self.sides, strict=True):
            depth = torch.arange(size * made, dtype=torch.float64) + 0.5  # from the tile's edge
            overlap = max(self.overlap * made, 1)
            rising = ((depth - overlap / 4) / (overlap / 2)).clamp(0, 1)
            ones = torch.ones_like(rising)
            parts.append((rising if start else ones) * (rising.flip(0) if start + size < side else ones))
        return parts[0][:, None] * parts[1]


def _starts(side: int, size: int, overlap: int) -> list[int]:
    """Where tiles of ``size`` begin, that cover ``side``."""
    if size >= side:
        return [0]
    count = -(-(side - overlap) // (size - overlap))
    return [round(number * (side - size) / (count - 1)) for number in range(count)]
