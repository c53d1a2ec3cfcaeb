"""FLOPs against numbers worked out by hand, and the prior's closed form against PyTorch's counter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.sight import Sight
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.flops import ForwardFlops, ShapesOnly, count_flops, peak_tflops
from stpredict.training.gpu_peaks import PEAKS


class Little(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Conv1d(16, 4, 3, padding=1)

    def forward(self, x, twice=False):
        y = self.second(torch.tanh(self.first(x)).mT)
        return y + self.second(self.first(x).mT) if twice else y


class OfLittle:
    """A task as far as FLOPs are concerned."""

    def __init__(self, model, flops=None):
        self.model, self.flops = model, flops

    def forward_flops(self, *args, **kwargs):
        return self.flops


def of_little(batch, length):
    return 2 * batch * length * (8 * 16 + 16 * 4 * 3)


def test_flops_are_those_of_the_training_forwards_since_the_last_look():
    model = Little()
    flops = ForwardFlops(OfLittle(model))
    flops.watch(model)
    assert flops.take() == 0
    for _ in range(3):
        model(torch.randn(2, 5, 8))
    model(torch.randn(1, 7, 8), twice=True)
    model.eval()(torch.randn(2, 5, 8))  # a validation
    assert flops.take() == 3 * of_little(2, 5) + 2 * of_little(1, 7)
    model.train()(torch.randn(2, 5, 8))
    assert flops.take() == of_little(2, 5)


def test_a_task_may_say_its_flops_and_a_model_that_cannot_be_counted_is_trained_without(caplog):
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    for said, found in ((70.0, 70.0), (None, 0.0)):
        model = Looks(2, 2)
        flops = ForwardFlops(OfLittle(model, said))
        flops.watch(model)
        model(torch.ones(1, 2))
        assert flops.take() == found
    assert "FLOPs are not counted" in caplog.text


def test_attention_counts_every_pair_although_this_runs_on_a_cpu():
    class Attend(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    q, k = torch.empty(2, 3, 10, 4), torch.empty(2, 3, 20, 4)
    assert count_flops(ShapesOnly(Attend()), (q, k), {}) == 2 * 3 * (2 * 10 * 20 * 4) * 2


@pytest.mark.parametrize("conditioning", [{"kind": "frames"}, {"kind": "class"}, {"kind": "class", "start": "hybrid"}])
@pytest.mark.parametrize("block", [(1, 1, 1), (1, 1, 4), (1, 4, 4), (2, 4, 4), (3, 1, 2), (3, 4, 4)])
def test_the_priors_closed_form(block, conditioning, monkeypatch):
    config = NextBlockConfig(layers=3, width=32, heads=2, mlp_width=48, block=block, conditioning=conditioning)
    model = NextBlockPrior(config, 100, (4, 4, 4), classes=3)
    number = [block for block, size in enumerate(model.order.sizes[:-1]) for _ in range(size)]
    if model.prefix:  # the class and the start come before the first block
        start = list(range(-model.start, 0)) if model.hybrid else [-1] * model.start
        number = [-1 - model.start, *start, *number]
    pairs = sum(1 for i in number for j in number if j <= i)
    of_attention = config.layers * 2 * 2 * pairs * config.width
    inputs = torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long) if model.prefix else None
    counted = count_flops(ShapesOnly(model), inputs, {})
    monkeypatch.setattr(Sight, "attend", lambda self, q, k, v, _: q)
    of_products = count_flops(ShapesOnly(model), inputs, {})
    assert model.flops() == of_products + of_attention
    # The counter itself is exact where the whole sequence is one call of our own operator.
    if block not in ((1, 1, 1), (3, 1, 2), (3, 4, 4)) and not model.hybrid:
        assert counted == model.flops()
    scored = model.flops() - 2 * 32 * 100 * (48 - model.first_predicted)
    assert model.flops(score_from=48) == scored


def test_a_tokenizer_is_counted_by_its_convolutions():
    config = CausalCnnConfig(
        video_channels=1, patch=4, channels=(8, 8), blocks=(0, 0), strides=((2, 1, 1),), middle_blocks=0, groups=4,
        levels=(4, 4),
    )  # fmt: skip
    model = CausalCnnTokenizer(config)
    found = count_flops(ShapesOnly(model), (torch.empty(2, 1, 5, 8, 8),), {})
    expected = 0
    handles = [
        layer.register_forward_hook(lambda layer, args, out: sums.append(2 * out.numel() * layer.weight[0].numel()))
        for layer in model.modules()
        if isinstance(layer, nn.Conv3d)
    ]
    sums = []
    model(torch.randn(2, 1, 5, 8, 8))
    for handle in handles:
        handle.remove()
    expected = sum(sums)
    assert found == expected > 0


def test_counting_copies_no_weights_of_a_large_model():
    with torch.device("meta"):
        config = NextBlockConfig()
        model = NextBlockPrior(config, 64_000, (5, 16, 16))
    shapes = ShapesOnly(model)
    assert count_flops(shapes, (torch.zeros(1, 1280, dtype=torch.long),), {}) > 1e12


def test_what_the_config_gives_goes_before_the_table_and_without_both_the_log_says_what_to_do(caplog):
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, torch.bfloat16, 2.5) == 2.5
    caplog.set_level("INFO")
    assert peak_tflops(cpu, torch.bfloat16, None) is None
    assert "training.peak_tflops" in caplog.text


def test_a_gpus_peak_is_that_of_the_precision(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_tflops(gpu, torch.bfloat16, None) == 312
    assert peak_tflops(gpu, torch.float32, None) == 19.5
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_tflops(gpu, torch.float32, None) == 156
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_table_holds_dense_peaks():
    """Tensor cores do in half precision twice what they do in TF32; sparse numbers among them would show."""
    for name, peak in PEAKS.items():
        if peak.tf32 is not None:
            assert peak.bf16 == peak.fp16, name
            assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.02), name
        assert peak.fp32 <= (peak.tf32 or peak.fp16), name
