"""SimVP as OpenSTL publishes it (github.com/chengtan9907/OpenSTL, openstl/models/simvp_model.py): its names, and ours.

Their state dict says ``enc`` for the encoder, ``hid`` for the translator and ``dec`` for the decoder. Inside, the parts
of a translator's block go by the names of the code that each was taken from; ``BLOCK`` lists them. Numbers stay what
they are: frames in [0, 1], or standardised fields.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.forecasters.config import SimVPConfig, SwinConfig
from stpredict.forecasters.simvp import SimVP

#: What stands around theirs, by whom it was saved: torch's DistributedDataParallel, Lightning.
PREFIXES = ("module.", "model.")
#: Theirs that are no weights: computed from the sizes of the windows.
COMPUTED = ("relative_position_index", "attn_mask")

_MLP = {"mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2"}
_SPATIAL_MLP = _MLP | {"mlp.spatial": "mlp.dwconv.dwconv"}
_SCALES = {"add1.scale": "layer_scale_1", "add2.scale": "layer_scale_2"}
_LARGE_KERNEL = {
    "mixer.project_in": "attn.proj_1",
    "mixer.unit.spatial.0": "attn.spatial_gating_unit.conv0",
    "mixer.unit.spatial.1": "attn.spatial_gating_unit.conv_spatial",
    "mixer.unit.mix": "attn.spatial_gating_unit.conv1",
    "mixer.project_out": "attn.proj_2",
}
_ATTENTION = {"mixer.qkv": "attn.qkv", "mixer.out": "attn.proj"}
#: By translator, how names begin in a block: ours, and theirs. What is not listed is called the same.
BLOCK = {
    "gsta": _LARGE_KERNEL | _SPATIAL_MLP | _SCALES,
    "van": _LARGE_KERNEL | _SPATIAL_MLP | _SCALES,
    "tau": _LARGE_KERNEL | {"mixer.unit.among_frames": "attn.spatial_gating_unit.fc"} | _SPATIAL_MLP | _SCALES,
    "vit": _ATTENTION | _MLP,
    "swin": _ATTENTION | {"mixer.bias": "attn.relative_position_bias_table"} | _MLP,
    "uniformer": {
        "position": "pos_embed",
        "block.norm1": "norm1",
        "block.mixer.0": "conv1",
        "block.mixer.1": "attn",
        "block.mixer.2": "conv2",
        "block.mixer.qkv": "attn.qkv",
        "block.mixer.out": "attn.proj",
        "block.add1.scale": "gamma_1",
        "block.norm2": "norm2",
        "block.mlp.expand": "mlp.fc1",
        "block.mlp.contract": "mlp.fc2",
        "block.add2.scale": "gamma_2",
    },
    "mlp_mixer": {
        "mixer.expand": "mlp_tokens.fc1",
        "mixer.contract": "mlp_tokens.fc2",
        "mlp.expand": "mlp_channels.fc1",
        "mlp.contract": "mlp_channels.fc2",
    },
    "conv_mixer": {"spatial": "conv_dw", "norm1": "norm_1", "mix": "conv_pw", "norm2": "norm_2"},
    "poolformer": _MLP | _SCALES,
    "convnext": {"spatial": "conv_dw", "add.scale": "gamma"} | _MLP,
    "hornet": {
        "mixer.project_in": "gnconv.proj_in",
        "mixer.spatial": "gnconv.dwconv",
        "mixer.mixes": "gnconv.pws",
        "mixer.project_out": "gnconv.proj_out",
        "mlp.expand": "pwconv1",
        "mlp.contract": "pwconv2",
        "add1.scale": "gamma1",
        "add2.scale": "gamma2",
    },
    "moganet": {
        "mixer.project_in": "attn.proj_1",
        "mixer.contrast.sigma": "attn.sigma",
        "mixer.gate": "attn.gate",
        "mixer.value.near": "attn.value.DW_conv0",
        "mixer.value.middle": "attn.value.DW_conv1",
        "mixer.value.far": "attn.value.DW_conv2",
        "mixer.value.mix": "attn.value.PW_conv",
        "mixer.project_out": "attn.proj_2",
        "mlp.spatial": "mlp.dwconv",
        "mlp.common": "mlp.decompose",
        "mlp.contrast.sigma": "mlp.sigma",
    }
    | _MLP
    | _SCALES,
    "incepu": {"squeeze": "conv1", "branches": "layers"},
}


def openstl_names(model: SimVP) -> dict[str, str]:
    """Theirs for each name of our state dict."""
    return {name: _theirs(name, model.config) for name in model.state_dict()}


def from_openstl(found: Mapping[str, Any], model: SimVP, where: str) -> dict[str, Tensor]:
    """The state of ``model``, in fp32, from what their file holds: the state dict itself or, as trainers save it, under
    ``state_dict`` and with a prefix.

    UsageError, which begins with ``where``, where theirs has no such network, or weights are missing, left over, or of
    another size.
    """
    _check(model.config, where)
    inside = found.get("state_dict", found)
    if not isinstance(inside, Mapping):
        raise UsageError(f"{where}: state_dict holds a {type(inside).__name__}, not weights by name")
    weights = {_without_prefix(str(name)): tensor for name, tensor in inside.items() if torch.is_tensor(tensor)}
    names, state = openstl_names(model), {}
    for ours, tensor in model.state_dict().items():
        theirs = names[ours]
        has = weights.get(theirs)
        # A 1x1 convolution of ours may be their linear layer, and one value per channel has further axes there.
        if has is None or _long_axes(has) != _long_axes(tensor):
            what = "is missing" if has is None else f"is {tuple(has.shape)}, {tuple(tensor.shape)} is needed"
            raise UsageError(f"{where}: {theirs} {what}; `model` has to describe the network of the weights")
        state[ours] = has.reshape(tensor.shape).to(tensor.dtype)
    left_over = weights.keys() - set(names.values())
    if more := sorted(name for name in left_over if not name.endswith(COMPUTED)):
        raise UsageError(
            f"{where}: {more[0]} has no place in this network; `model` has to describe that of the weights"
        )
    return state


def _check(config: SimVPConfig, where: str) -> None:
    if config.quantizer is not None:
        raise UsageError(f"{where}: OpenSTL's SimVP has no quantizer; give model.quantizer=null")
    if isinstance(config.translator, SwinConfig) and config.translator.masked:
        raise UsageError(f"{where}: OpenSTL's Swin has no mask; give model.translator.masked=false")


def _theirs(name: str, config: SimVPConfig) -> str:
    part, name = name.split(".", maxsplit=1)
    match part:
        case "encoder":
            return _renamed(name, {f"blocks.{number}": f"enc.enc.{number}.conv" for number in range(config.N_S)})
        case "decoder":
            # What doubles the sides is their convolution and PixelShuffle in a sequence.
            up = {f"blocks.{number}.conv": f"dec.dec.{number}.conv.conv.0" for number in range(0, config.N_S, 2)}
            others = {f"blocks.{number}": f"dec.dec.{number}.conv" for number in range(config.N_S)}
            return _renamed(name, up | others | {"readout": "dec.readout"})
        case _:
            return _of_translator(name, config)


def _of_translator(name: str, config: SimVPConfig) -> str:
    kind = config.translator.kind
    _, number, inside = name.split(".", maxsplit=2)
    if kind == "incepu":  # two halves, each numbered through
        half, number = ("enc", int(number)) if int(number) < config.N_T else ("dec", int(number) - config.N_T)
        return f"hid.{half}.{number}.{_renamed(inside, BLOCK[kind])}"
    if inside.startswith("project."):
        return f"hid.enc.{number}.reduction.{inside.removeprefix('project.')}"
    return f"hid.enc.{number}.block.{_renamed(inside.removeprefix('block.'), BLOCK[kind])}"


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """``name`` with the beginning, up to a full stop or the end, that ``names`` gives another."""
    for ours, theirs in names.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _long_axes(tensor: Tensor) -> list[int]:
    return [length for length in tensor.shape if length > 1]
