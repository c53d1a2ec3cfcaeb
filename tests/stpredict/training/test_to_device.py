"""Batches on their way to the device."""

import pytest
import torch

from stpredict.training.task import to_device


def test_tensors_go_and_the_rest_stays():
    clip = torch.arange(4.0)
    sent = to_device({"clip": clip, "key": ["a"]}, torch.device("cpu"))
    assert sent["key"] == ["a"]
    assert torch.equal(sent["clip"], clip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_is_sent_without_waiting_for_what_the_gpu_has_yet_to_do():
    device = torch.device("cuda")
    clip = torch.arange(1e6)
    to_device({"clip": clip}, device)  # pinned memory is allocated
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    busy = torch.cuda.Event()
    busy.record()
    sent = to_device({"clip": clip}, device)
    assert not busy.query()
    assert torch.equal(sent["clip"].cpu(), clip)
