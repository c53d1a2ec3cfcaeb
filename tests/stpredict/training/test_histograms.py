"""Which bin an element counts in, and what is left out."""

from types import SimpleNamespace

import torch

from stpredict.training.histograms import EDGES, histograms
from stpredict.training.pieces import Piece

ALONE = SimpleNamespace(sum=lambda tensor: tensor, max=lambda tensor: tensor)


def test_an_element_on_an_edge_counts_below_it_and_what_is_not_finite_nowhere():
    values = torch.tensor([0.0, 1.0, -1.0, 1.01, -1e-20, 1e-20, 2.0**30, -(2.0**30), torch.nan, torch.inf, -torch.inf])
    piece = Piece("model/weight/w", (11,), 0, values, True)
    found = histograms([piece], ["model/weight/w", "model/weight/elsewhere"], ALONE)
    assert found.keys() == {"model/weight/w"}
    histogram = found["model/weight/w"]
    assert (histogram.elements, histogram.least, histogram.most) == (8, -(2.0**30), 2.0**30)
    assert histogram.sum == sum(values[:8].double().tolist())
    below = [-torch.inf, *EDGES.tolist()]
    above = [*EDGES.tolist(), torch.inf]
    expected = [
        sum(low < value <= high for value in values[:8].tolist()) for low, high in zip(below, above, strict=True)
    ]
    assert histogram.counts == expected
