import sys

from tests.processes import succeeding

CHECK = """
import os, torch
from stpredict.training.determinism import make_deterministic
make_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert not torch.backends.cudnn.benchmark
"""


def test_nondeterministic_kernels_are_ruled_out():
    succeeding([sys.executable, "-c", CHECK])
