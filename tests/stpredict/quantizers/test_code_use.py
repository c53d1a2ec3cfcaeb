import pytest
import torch

from stpredict.quantizers.code_use import perplexity, share_used


def test_codes_used_alike_have_their_number_as_perplexity():
    assert perplexity(torch.tensor([5, 5, 0, 5, 5, 0, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 9])) == pytest.approx(1)
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(4 / 3**0.75)  # exp(ln 4 - 3/4 ln 3)
    assert share_used(torch.tensor([5, 5, 0, 5, 5, 0, 0, 0])) == 0.5
