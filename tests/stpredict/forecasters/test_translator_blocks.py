"""What each translator's block computes, against the papers' formulas written out in plain functions, in float64."""

import pytest
import torch
import torch.nn.functional as F
from translator_kinds import config_of, randomised, translator

from stpredict.forecasters.translators.conv_mixer import ConvMixerBlock
from stpredict.forecasters.translators.convnext import ConvNextBlock
from stpredict.forecasters.translators.gsta import gsta_block
from stpredict.forecasters.translators.hornet import hornet_block
from stpredict.forecasters.translators.mlp_mixer import mlp_mixer_block
from stpredict.forecasters.translators.moganet import moganet_block
from stpredict.forecasters.translators.poolformer import poolformer_block
from stpredict.forecasters.translators.swin import swin_block, window_side
from stpredict.forecasters.translators.tau import tau_block
from stpredict.forecasters.translators.uniformer import uniformer_block
from stpredict.forecasters.translators.van import van_block
from stpredict.forecasters.translators.vit import vit_block
from stpredict.layers.batch_norm import BatchNorm

C, RATIO, GRID = 16, 2.0, (7, 10)


class Weights:
    """A block's, by name, and operations with them."""

    def __init__(self, block):
        self.all = {name: tensor.detach() for name, tensor in block.state_dict().items()}

    def conv(self, name, x, dilation=1):
        """Zeros around, as many groups as the weight's shape says."""
        weight, bias = self.all[f"{name}.weight"], self.all[f"{name}.bias"]
        reach = dilation * (weight.shape[-1] // 2)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(F.pad(x, (reach,) * 4), weight, bias, dilation=dilation, groups=groups)

    def linear(self, name, x):
        """Over the channels of (b, c, h, w); of a 1x1 convolution, too."""
        weight, bias = self.all[f"{name}.weight"].flatten(1), self.all.get(f"{name}.bias")
        x = torch.einsum("oc,bchw->bohw", weight, x)
        return x if bias is None else x + each(bias)

    def batch_norm(self, name, x):
        mean, variance, weight, bias = (
            each(self.all[f"{name}.{part}"]).double() for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def layer_norm(self, name, x, eps, axes=(1,)):
        mean = x.mean(axes, keepdim=True)
        variance = (x - mean).square().mean(axes, keepdim=True)
        weight, bias = (each(self.all[f"{name}.{part}"]) for part in ("weight", "bias"))
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    def mlp(self, x, between=lambda x: x, name="mlp"):
        return self.linear(f"{name}.contract", F.gelu(between(self.linear(f"{name}.expand", x))))

    def spatial_mlp(self, x):
        return self.mlp(x, lambda x: self.conv("mlp.spatial", x))

    def scale(self, name):
        return each(self.all[f"{name}.scale"])

    def residuals(self, x, norm, mixer, mlp, scaled=True, prefix=""):
        one, two = (self.scale(f"{prefix}add{i}") if scaled else 1 for i in (1, 2))
        x = x + one * mixer(norm(f"{prefix}norm1", x))
        return x + two * mlp(norm(f"{prefix}norm2", x))


def each(values):
    return values[None, :, None, None]


def clip(batch=2, channels=C, grid=GRID, seed=1):
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(block, formula, x=None):
    x = clip() if x is None else x
    block = randomised(block).eval()
    with torch.no_grad():
        torch.testing.assert_close(block(x), formula(Weights(block), x), rtol=1e-9, atol=1e-9)


def large_kernel_attention(weights, x, unit):
    y = F.gelu(weights.linear("mixer.project_in", x))
    seen = weights.conv("mixer.unit.spatial.1", weights.conv("mixer.unit.spatial.0", y), dilation=3)
    return x + weights.linear("mixer.project_out", unit(y, weights.linear("mixer.unit.mix", seen)))


def softmax_attention(q, k, v, bias=0.0, heads=8):
    """(b, c, h, w) each; ``bias`` (heads, n, n) or what broadcasts, is added to the scores."""
    shape = q.shape
    q, k, v = (x.flatten(2).unflatten(1, (heads, -1)) for x in (q, k, v))  # b heads d n
    scores = torch.einsum("bedn,bedm->benm", q, k) / q.shape[2] ** 0.5 + bias
    return torch.einsum("benm,bedm->bedn", scores.softmax(-1), v).reshape(shape)


def self_attention(weights, x, name):
    return weights.linear(f"{name}.out", softmax_attention(*weights.linear(f"{name}.qkv", x).chunk(3, dim=1)))


def test_gsta_gates_what_a_large_kernel_sees():
    def unit(y, seen):
        f, g = seen[:, :C], seen[:, C:]
        return f / (1 + (-g).exp())

    compare(
        gsta_block(config_of("gsta", mlp_ratio=RATIO), C, 0.0),
        lambda w, x: w.residuals(x, w.batch_norm, lambda x: large_kernel_attention(w, x, unit), w.spatial_mlp),
    )


def test_van_weights_its_input_by_what_a_large_kernel_sees():
    def mixer(w):
        return lambda x: large_kernel_attention(w, x, lambda y, seen: y * seen)

    compare(
        van_block(config_of("van", mlp_ratio=RATIO), C, 0.0),
        lambda w, x: w.residuals(x, w.batch_norm, mixer(w), w.spatial_mlp),
    )


@pytest.mark.parametrize("channels", [16, 80])  # a sixteenth of 80 is more than 4
def test_tau_multiplies_attention_within_frames_with_one_weight_per_channel(channels):
    def formula(w, x):
        squeeze, expand = (w.all[f"mixer.unit.among_frames.{i}.weight"] for i in (0, 2))
        assert len(squeeze) == {16: 4, 80: 16}[channels]

        def unit(y, seen):
            per_channel = torch.sigmoid((y.mean((2, 3)) @ squeeze.T).relu() @ expand.T)
            return per_channel[:, :, None, None] * seen * y

        return w.residuals(x, w.batch_norm, lambda x: large_kernel_attention(w, x, unit), w.spatial_mlp)

    compare(tau_block(config_of("tau", mlp_ratio=RATIO), channels, 0.0), formula, clip(channels=channels))


def test_vit_attends_to_all_positions_with_eight_heads():
    def formula(w, x):
        norm = lambda name, x: w.layer_norm(name, x, 1e-5)  # noqa: E731
        return w.residuals(x, norm, lambda x: self_attention(w, x, "mixer"), w.mlp, scaled=False)

    compare(vit_block(config_of("vit", mlp_ratio=RATIO), C, 0.0), formula)


def test_uniformer_convolves_in_local_blocks():
    def formula(w, x):
        x = x + w.conv("position", x)

        def mixer(x):
            return w.linear("block.mixer.2", w.conv("block.mixer.1", w.linear("block.mixer.0", x)))

        return w.residuals(x, w.batch_norm, mixer, lambda x: w.mlp(x, name="block.mlp"), scaled=False, prefix="block.")

    compare(uniformer_block(config_of("uniformer", mlp_ratio=RATIO), C, 0.0, local=True), formula)


def test_uniformer_attends_in_the_others():
    def formula(w, x):
        x = x + w.conv("position", x)
        norm = lambda name, x: w.layer_norm(name, x, 1e-5)  # noqa: E731
        mixer = lambda x: self_attention(w, x, "block.mixer")  # noqa: E731
        return w.residuals(x, norm, mixer, lambda x: w.mlp(x, name="block.mlp"), prefix="block.")

    compare(uniformer_block(config_of("uniformer", mlp_ratio=RATIO), C, 0.0, local=False), formula)


def test_uniformer_is_local_first_and_last():
    blocks = translator("uniformer", blocks=4).blocks
    assert [isinstance(stage.block.block.norm1, BatchNorm) for stage in blocks] == [True, False, False, True]


def test_mlp_mixer_mixes_positions_the_same_way_in_every_channel():
    def formula(w, x):
        def mixer(x):
            n = x.flatten(2)
            for part, act in (("expand", F.gelu), ("contract", lambda x: x)):
                weight, bias = w.all[f"mixer.{part}.weight"], w.all[f"mixer.{part}.bias"]
                n = act(torch.einsum("on,bcn->bco", weight, n) + bias)
            return n.reshape(x.shape)

        norm = lambda name, x: w.layer_norm(name, x, 1e-6)  # noqa: E731
        assert len(w.all["mixer.expand.bias"]) == C // 2
        return w.residuals(x, norm, mixer, w.mlp, scaled=False)

    compare(mlp_mixer_block(config_of("mlp_mixer", mlp_ratio=RATIO), C, 0.0, GRID), formula)


def test_conv_mixer_has_a_shortcut_around_the_depthwise_convolution_alone():
    def formula(w, x):
        assert w.all["spatial.weight"].shape == (C, 1, 11, 11)
        x = x + w.batch_norm("norm1", F.gelu(w.conv("spatial", x)))
        return w.batch_norm("norm2", F.gelu(w.linear("mix", x)))

    compare(ConvMixerBlock(C), formula)


def test_poolformer_compares_each_position_with_the_mean_around_it():
    def mixer(x):
        out, (height, width) = torch.empty_like(x), x.shape[2:]
        for i in range(height):
            for j in range(width):
                around = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
                out[:, :, i, j] = around.mean((2, 3)) - x[:, :, i, j]
        return out

    def formula(w, x):
        norm = lambda name, x: w.layer_norm(name, x, 1e-5, axes=(1, 2, 3))  # noqa: E731
        return w.residuals(x, norm, mixer, w.mlp)

    compare(poolformer_block(config_of("poolformer", mlp_ratio=RATIO), C, 0.0), formula)


def test_convnext_is_one_branch_of_a_depthwise_convolution_and_an_mlp():
    def formula(w, x):
        assert w.all["spatial.weight"].shape == (C, 1, 7, 7)
        return x + w.scale("add") * w.mlp(w.layer_norm("norm", w.conv("spatial", x), 1e-6))

    compare(ConvNextBlock(config_of("convnext", mlp_ratio=RATIO), C, 0.0), formula)


def test_hornet_multiplies_four_times_in_a_row():
    def formula(w, x):
        def mixer(x):
            y = w.linear("mixer.project_in", x)
            p, others = y[:, : C // 8], w.conv("mixer.spatial", y[:, C // 8 :])
            start = 0
            for order, width in enumerate((C // 8, C // 4, C // 2, C)):
                if order:
                    p = w.linear(f"mixer.mixes.{order - 1}", p)
                p = p * others[:, start : start + width]
                start += width
            assert start == others.shape[1]
            return w.linear("mixer.project_out", p)

        return w.residuals(x, lambda name, x: w.layer_norm(name, x, 1e-6), mixer, w.mlp)

    compare(hornet_block(config_of("hornet", mlp_ratio=RATIO), C, 0.0), formula)


def test_moganet_gates_three_reaches_and_sets_channels_against_what_they_share():
    def formula(w, x):
        def mixer(x):
            y = w.linear("mixer.project_in", x)
            y = F.silu(y + each(w.all["mixer.contrast.sigma"]) * (y - y.mean((2, 3), keepdim=True)))
            near = w.conv("mixer.value.near", y)
            middle = w.conv("mixer.value.middle", near[:, C // 8 : C // 2], dilation=2)
            far = w.conv("mixer.value.far", near[:, C // 2 :], dilation=3)
            value = w.linear("mixer.value.mix", torch.cat([near[:, : C // 8], middle, far], dim=1))
            return x + w.linear("mixer.project_out", F.silu(w.linear("mixer.gate", y)) * F.silu(value))

        def mlp(x):
            y = F.gelu(w.conv("mlp.spatial", w.linear("mlp.expand", x)))
            y = y + each(w.all["mlp.contrast.sigma"]) * (y - F.gelu(w.linear("mlp.common", y)))
            return w.linear("mlp.contract", y)

        return w.residuals(x, w.batch_norm, mixer, mlp)

    compare(moganet_block(config_of("moganet", mlp_ratio=RATIO), C, 0.0), formula)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 12), (10, 9), (14, 21), (3, 8)])
def test_swin_is_dense_attention_among_what_windows_put_together(grid, shifted, masked):
    """Also on grids that windows of 4 do not divide, and in one window that is as high as the grid. (14, 21): of 7."""
    side = window_side(grid)
    shift = side // 2 if shifted and min(grid) > side else 0

    def stands(n):
        """Of each position on an axis, its window's number, and its place in it."""
        place = torch.arange(n) - shift
        whole = -(-n // side) * side
        windows = place.div(side, rounding_mode="floor") if masked else place.remainder(whole) // side
        return windows, place.remainder(whole) % side

    def formula(w, x):
        def mixer(x):
            row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
            together, offset = True, 0
            for axis, n in ((row, grid[0]), (column, grid[1])):
                windows, places = (values[axis] for values in stands(n))
                together = together & (windows[:, None] == windows)
                offset = offset * (2 * side - 1) + places[:, None] - places + side - 1
            bias = w.all["mixer.bias"][offset].permute(2, 0, 1).masked_fill(~together, -torch.inf)
            q, k, v = w.linear("mixer.qkv", x).chunk(3, dim=1)
            return w.linear("mixer.out", softmax_attention(q, k, v, bias))

        return w.residuals(x, lambda name, x: w.layer_norm(name, x, 1e-5), mixer, w.mlp, scaled=False)

    config = config_of("swin", mlp_ratio=RATIO, masked=masked)
    compare(swin_block(config, C, 0.0, grid, shifted), formula, clip(grid=grid))


@pytest.mark.parametrize(
    ("grid", "side"), [((16, 16), 4), ((28, 30), 7), ((64, 80), 4), ((96, 96), 6), ((160, 160), 8), ((2, 8), 2)]
)
def test_swins_windows_have_the_published_sides(grid, side):
    assert window_side(grid) == side


def test_incepu_is_a_u_without_contraction():
    model = randomised(translator("incepu", channels=24, hidden=16, blocks=3, kernels=(3, 5), groups=4)).eval()
    w = Weights(model)

    def inception(i, x):
        x = w.linear(f"blocks.{i}.squeeze", x)
        out = 0
        for branch in range(2):
            name = f"blocks.{i}.branches.{branch}"
            y = w.conv(f"{name}.conv", x).unflatten(1, (4, -1))
            y = (y - y.mean((2, 3, 4), keepdim=True)) / (y.var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
            y = y.flatten(1, 2) * each(w.all[f"{name}.norm.weight"]) + each(w.all[f"{name}.norm.bias"])
            out = out + torch.where(y > 0, y, 0.2 * y)
        return out

    x = clip(channels=24)
    first = inception(0, x)
    second = inception(1, first)
    turned = inception(3, inception(2, second))
    out = inception(5, torch.cat([inception(4, torch.cat([turned, second], 1)), first], 1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), out, rtol=1e-9, atol=1e-9)
