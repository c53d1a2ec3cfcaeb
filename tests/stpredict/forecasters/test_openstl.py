"""State dicts in OpenSTL's layout, made up here, as ours."""

import pytest
import torch
from openstl_layout import layout, state_dict
from translator_kinds import KINDS, config_of

from data_pipeline.errors import UsageError
from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.openstl import from_openstl, openstl_names
from stpredict.forecasters.simvp import SimVP
from stpredict.quantizers.config import SvqConfig


def config(kind: str, **model) -> SimVPConfig:
    translator = {"mlp_ratio": 2} if kind not in ("incepu", "conv_mixer") else {}
    translator |= {"masked": False} if kind == "swin" else {}
    sizes = {"channels": 3, "input_frames": 3, "output_frames": 3, "size": (32, 48), "hid_S": 8, "hid_T": 32, "N_T": 3}
    return SimVPConfig(**sizes | {"translator": config_of(kind, **translator)} | model)


def used(model: SimVP) -> list[str]:
    """Modules that hold anything themselves, in the order in which a forward pass comes to them."""
    names = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
    model.eval()(torch.rand(1, 3, 3, 32, 48))
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_part_that_ours_uses_has_the_weights_of_the_nth_that_theirs_uses(kind):
    model, parts = SimVP(config(kind)), layout(kind, config(kind))
    theirs = state_dict(parts)
    ours = from_openstl(theirs, model, "file")
    model.load_state_dict(ours)
    modules = used(model)
    assert len(modules) == len(parts)
    for module, (name, shapes) in zip(modules, parts, strict=True):
        found = [tensor for key, tensor in ours.items() if key.rpartition(".")[0] == module]
        for tensor, wanted in zip(found, shapes, strict=True):
            torch.testing.assert_close(tensor.flatten(), theirs[f"{name}.{wanted}"].flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_theirs_is_one_of_ours(kind):
    names = openstl_names(SimVP(config(kind)))
    assert sorted(names.values()) == sorted(state_dict(layout(kind, config(kind))))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_trainers_put_around_a_state_dict_does_not_matter(prefix, wrapped):
    model, theirs = SimVP(config("gsta")), state_dict(layout("gsta", config("gsta")))
    found = {f"{prefix}{name}": tensor for name, tensor in theirs.items()}
    found = {"state_dict": found, "epoch": 3, "optimizer": {}} if wrapped else found
    expected = from_openstl(theirs, model, "file")
    for name, tensor in from_openstl(found, model, "file").items():
        assert torch.equal(tensor, expected[name])


def test_what_swin_computes_from_the_sizes_of_its_windows_is_passed_over():
    model, theirs = SimVP(config("swin")), state_dict(layout("swin", config("swin")))
    theirs["hid.enc.0.block.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    theirs["hid.enc.1.block.attn_mask"] = torch.zeros(6, 16, 16)
    assert from_openstl(theirs, model, "file").keys() == model.state_dict().keys()


def test_halves_become_fp32_and_counts_stay_whole():
    theirs = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict(layout("gsta", config("gsta"))).items()
    }
    types = {tensor.dtype for tensor in from_openstl(theirs, SimVP(config("gsta")), "file").values()}
    assert types == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"N_T": 4}, r"file: hid\.enc\.2\.block\.norm1\.weight is \(32,\)|file: hid\.enc\.3\.\S+ is missing"),
        ({"N_T": 2}, r"file: hid\.enc\.1\.reduction\.weight is missing"),
        ({"hid_S": 16}, r"file: enc\.enc\.0\.conv\.conv\.weight is \(8, 3, 3, 3\), \(16, 3, 3, 3\) is needed"),
        ({"N_S": 2}, r"file: dec\.dec\.2\.conv\.conv\.0\.bias has no place in this network"),
        (
            {"translator": config_of("van", mlp_ratio=2)},
            r"conv1\.weight is \(48, 24, 1, 1\), \(24, 24, 1, 1\) is needed",
        ),
        ({"quantizer": SvqConfig(codebook_size=8)}, "has no quantizer; give model.quantizer=null"),
        ({"translator": config_of("swin")}, "Swin has no mask; give model.translator.masked=false"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(model, message):
    theirs = state_dict(layout("gsta", config("gsta")))
    with pytest.raises(UsageError, match=message):
        from_openstl(theirs, SimVP(config("gsta", **model)), "file")


def test_a_file_without_weights_is_refused():
    model = SimVP(config("gsta"))
    with pytest.raises(UsageError, match="state_dict holds a list"):
        from_openstl({"state_dict": [1]}, model, "file")
    with pytest.raises(UsageError, match=r"enc\.enc\.0\.conv\.conv\.weight is missing"):
        from_openstl({"epoch": 3}, model, "file")
