"""What holds of every translator."""

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from translator_kinds import KINDS, config_of, randomised, translator

from data_pipeline.errors import UsageError
from stpredict.forecasters.translators.build import build_translator
from stpredict.forecasters.translators.metaformer import Add, MetaFormer
from stpredict.layers.batch_norm import BatchNorm

every_kind = pytest.mark.parametrize("kind", KINDS)
with_blocks = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("incepu", "conv_mixer")])


def latents(batch=2, channels=24, grid=(8, 12)):
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(1))


@every_kind
def test_the_output_has_the_inputs_shape_and_depends_on_every_channel_of_it_and_on_every_parameter(kind):
    model = randomised(translator(kind))
    x = latents().double().requires_grad_()
    out = model(x)
    assert out.shape == x.shape
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights).sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 1e-12).all()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_kind
def test_samples_do_not_see_each_other_in_evaluation(kind):
    model, x = randomised(translator(kind)).eval(), latents(3).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@every_kind
def test_channels_last_stays_so_and_changes_no_number(kind):
    model, x = randomised(translator(kind)).eval(), latents().double()
    with torch.no_grad():
        expected = model(x)
        out = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


@every_kind
def test_blocks_in_their_order_are_what_may_be_computed_one_by_one(kind):
    model, called = translator(kind), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    model(latents())
    assert called == list(range(6 if kind == "incepu" else 3))
    of_blocks = sum(p.numel() for p in model.blocks.parameters())
    assert of_blocks == sum(p.numel() for p in model.parameters())


@every_kind
def test_it_learns_in_bf16_autocast(kind):
    model = translator(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(latents()).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_kind
def test_nothing_but_the_running_statistics_of_batch_norm_is_saved_besides_parameters(kind):
    model = translator(kind)
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(model.get_submodule(norm), BatchNorm) for norm in norms)  # not torch's
    statistics = {f"{norm}.{of}" for norm in norms for of in ("running_mean", "running_var", "num_batches_tracked")}
    assert model.state_dict().keys() - dict(model.named_parameters()).keys() == statistics


def test_every_other_block_of_swin_shifts_its_windows_unless_one_is_as_high_as_the_grid():
    def shifts(**grid):
        return [stage.block.mixer.shift for stage in translator("swin", blocks=4, **grid).blocks]

    assert shifts() == [0, 2, 0, 2]
    assert shifts(grid=(4, 12)) == [0, 0, 0, 0]


def test_only_blocks_whose_neighbour_has_other_channels_are_followed_by_a_convolution():
    def convolved(channels, hidden, blocks):
        stages = translator("convnext", channels=channels, hidden=hidden, blocks=blocks).blocks
        return [isinstance(stage.project, torch.nn.Conv2d) for stage in stages]

    assert convolved(24, 16, 4) == [True, False, False, True]
    assert convolved(24, 16, 2) == [True, True]
    assert convolved(16, 16, 3) == [False, False, False]


@with_blocks
def test_drop_path_grows_linearly_from_0(kind):
    rates = translator(kind, blocks=4, drop_path=0.3).drop_rates
    of_a_block = 1 if kind == "convnext" else 2
    assert rates == pytest.approx([rate for rate in (0, 0.1, 0.2, 0.3) for _ in range(of_a_block)])


@pytest.mark.parametrize("kind", ["incepu", "conv_mixer"])
def test_without_residual_branches_nothing_is_left_out(kind):
    assert not list(translator(kind).drop_rates)


@with_blocks
def test_a_sample_whose_branches_are_all_left_out_passes_unchanged_and_the_others_as_they_would(kind):
    model = randomised(translator(kind, channels=16, hidden=16, drop_path=0.5)).eval()
    x = latents(3, 16).double()
    factors = torch.ones(len(model.drop_rates), 3, dtype=torch.float64)
    factors[:, 1] = 0
    with torch.no_grad():
        got, whole = model(x, factors), model(x)
        expected = x
        if kind == "uniformer":
            for stage in model.blocks:
                expected = expected + stage.block.position(expected)
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]])
    assert not torch.allclose(got[1], whole[1])


@with_blocks
def test_each_branch_has_its_own_factor(kind):
    model, x = randomised(translator(kind, drop_path=0.5)).eval(), latents(2).double()
    outputs = []
    with torch.no_grad():
        for left_out in range(len(model.drop_rates)):
            factors = torch.ones(len(model.drop_rates), 2, dtype=torch.float64)
            factors[left_out] = 0
            outputs.append(model(x, factors))
    assert len({round(out.sum().item(), 6) for out in outputs}) == len(model.drop_rates)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_what_is_kept_and_layer_scale_multiply_whole_branches(scale):
    x, branch, factors = latents(3), latents(3).square() + 1, torch.tensor([0.0, 1.0, 4 / 3])
    add = Add(24, scale, 0.25)
    torch.testing.assert_close(add(x, branch, factors), x + (scale or 1) * factors[:, None, None, None] * branch)
    torch.testing.assert_close(add(x, branch), x + (scale or 1) * branch)


@pytest.mark.parametrize("kind", ["van", "uniformer", "conv_mixer", "moganet", "incepu"])
def test_a_translator_of_convolutions_takes_other_grids_than_its_own(kind):
    assert translator(kind)(latents(grid=(6, 5))).shape == (2, 24, 6, 5)


@pytest.mark.parametrize("kind", ["swin", "mlp_mixer"])
def test_a_translator_made_for_a_grid_is_not_used_on_another(kind):
    with pytest.raises((RuntimeError, ValueError)):
        translator(kind)(latents(grid=(12, 16)))


@pytest.mark.parametrize("kind", ["vit", "swin", "uniformer", "hornet", "moganet"])
def test_widths_that_eight_does_not_divide_are_refused(kind):
    with pytest.raises(UsageError, match=rf"20 channels \(input_frames x hid_S\).*8.*{kind}"):
        translator(kind, channels=20)
    with pytest.raises(UsageError, match=rf"model.hid_T: 20 .*8.*{kind}"):
        translator(kind, hidden=20)


def test_widths_that_the_groups_of_incepu_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"20 channels.*no multiple of 8"):
        translator("incepu", channels=20)
    with pytest.raises(UsageError, match="hid_T: 24 is no multiple of 16"):  # half of them are convolved in groups
        translator("incepu", hidden=24)
    translator("incepu", channels=20, hidden=24, groups=4)


@pytest.mark.parametrize("kind", ["gsta", "incepu"])
def test_one_block_is_none_of_theirs(kind):
    with pytest.raises(ValueError, match="at least 2"):
        translator(kind, blocks=1)


def test_an_mlp_ratio_is_that_of_the_mlp():
    def hidden(ratio):
        model = build_translator(config_of("gsta", mlp_ratio=ratio), 24, 16, 2, (8, 8))
        assert isinstance(model, MetaFormer)
        return [stage.block.mlp.expand.out_channels for stage in model.blocks]

    assert hidden(8) == [192, 128]
    assert hidden(2.5) == [60, 40]
