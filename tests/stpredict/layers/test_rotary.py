import torch

from stpredict.layers.rotary import axis_pairs, rotate, rotation


def test_one_axis_equals_complex_rotation():
    positions = torch.arange(7)[:, None]
    x = torch.randn(2, 3, 7, 8, dtype=torch.float32)
    frequency = 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * positions * frequency)
    torch.testing.assert_close(rotate(x, *rotation(positions, 8)), torch.cat([turned.real, turned.imag], -1))


def test_scores_depend_on_the_offset_along_every_axis_alone():
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(at, to):
        here, there = (rotation(torch.tensor([p]), 12) for p in (at, to))
        return (rotate(q, *here) * rotate(k, *there)).sum()

    torch.testing.assert_close(score((1, 2, 3), (2, 0, 3)), score((4, 7, 1), (5, 5, 1)))
    assert not torch.isclose(score((1, 2, 3), (2, 0, 3)), score((1, 2, 3), (2, 0, 4)))


def test_every_axis_gets_its_share_of_a_head():
    assert axis_pairs(64, 1) == [32]
    assert axis_pairs(64, 3) == [12, 10, 10]
