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


@pytest.mark.parametrize("block", SHAPES)
def test_order_is_undone_and_coordinates_follow_it(block):
    order = BlockOrder((4, 4, 4), block)
    ids = torch.arange(64).view(1, 4, 4, 4)
    sequence = order.to_sequence(ids)
    assert torch.equal(order.to_grid(sequence), ids)
    t, h, w = order.coordinates.T
    assert torch.equal(ids[0][t, h, w], sequence[0])


def test_a_block_that_does_not_divide_the_grid_is_named():
    with pytest.raises(ValueError, match="block 1x3x4 does not divide the token grid 5x4x4"):
        BlockOrder((5, 4, 4), (1, 3, 4))
