import math

import pytest
import torch

from stpredict.priors.block_order import BlockOrder

SHAPES = [(1, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 4, 4)]


def test_blocks_in_raster_order_tokens_in_raster_order_inside():
    grid = torch.arange(16).view(1, 1, 4, 4)
    assert BlockOrder((1, 4, 4), (1, 2, 2)).to_sequence(grid)[0].tolist() == [
        *(0, 1, 4, 5),
        *(2, 3, 6, 7),
        *(8, 9, 12, 13),
        *(10, 11, 14, 15),
    ]


@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 4, 4), (1, 4, 4)])
@pytest.mark.parametrize("block", SHAPES)
def test_order_is_undone_and_coordinates_follow_it(block, grid):
    order = BlockOrder(grid, block)
    ids = torch.arange(math.prod(grid)).view(1, *grid)
    sequence = order.to_sequence(ids)
    assert torch.equal(order.to_grid(sequence), ids)
    assert sum(order.sizes) == order.ends[-1] == order.tokens == ids.numel()
    t, h, w = order.coordinates.T
    assert torch.equal(ids[0][t, h, w], sequence[0])


def test_a_block_that_does_not_divide_the_grid_is_named():
    with pytest.raises(ValueError, match="block 1x3x4 does not divide the token grid 5x4x4: height and width must"):
        BlockOrder((5, 4, 4), (1, 3, 4))


@pytest.mark.parametrize("block", [(2, 1, 2), (2, 2, 2), (3, 1, 4), (4, 4, 4)])
def test_a_grid_of_other_length_is_read_as_if_it_were_padded_and_the_padding_left_out(block):
    grid = (5, 4, 4)
    padded_grid = (-(-5 // block[0]) * block[0], 4, 4)
    ids = torch.arange(80).view(1, *grid)
    padded = torch.full((1, *padded_grid), -1)
    padded[:, :5] = ids
    of_padded = BlockOrder(padded_grid, block).to_sequence(padded).view(-1, math.prod(block))
    order = BlockOrder(grid, block)
    blocks = order.to_sequence(ids)[0].split(order.sizes)
    assert len(blocks) == len(of_padded)
    for found, expected in zip(blocks, of_padded, strict=True):
        real = (expected >= 0).sum()
        assert (expected[:real] >= 0).all()  # token j of a block keeps its place
        assert torch.equal(found, expected[:real])
