import copy

import torch
from torch import nn

from stpredict.layers.batch_norm import BatchNorm
from stpredict.training.activation_checkpointing import recompute
from stpredict.training.computing import ActivationCheckpointingConfig


def test_it_is_part_of_one_compiled_graph_that_can_be_recomputed_and_counts_a_batch_once():
    layer = nn.Sequential(BatchNorm(3), nn.SiLU())
    expected = copy.deepcopy(layer)
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    recompute([layer], ActivationCheckpointingConfig(policy="layers"))
    x = torch.randn(4, 3, 5, 5)
    for network in (layer, expected):
        network(x).square().sum().backward()
    for parameter, wanted in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    for buffer, wanted in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted)
