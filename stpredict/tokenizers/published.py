"""NBP's tokenizer as its authors published it (github.com/RenShuhuai-Andy/NBP, nbp/magvit2.py): names and pixels.

Their encoder and decoder are lists of layers, numbered through, in which our stages, norm, activation and last
convolution follow each other; what has no weights (depth to space) counts too. Their pixels are in [0, 1].
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from stpredict.layers.causal_conv import CausalConv3d, CausalUpsample, ResidualBlock
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer, Decoder, Encoder

PREFIX = "module."  # of torch's DistributedDataParallel
#: Parts of a residual block: ours, and theirs.
OF_BLOCK = {"norm1": "fn.0", "act1": "fn.1", "conv1": "fn.2", "norm2": "fn.3", "act2": "fn.4", "conv2": "fn.5"}


def published_names(model: CausalCnnTokenizer) -> dict[str, str]:
    """Theirs for each of our parameters."""
    encoder, decoder = model.encoder, model.decoder
    of_encoder = [encoder.conv_in, *encoder.stages, *encoder.middle, *_tail(encoder)]
    of_decoder = [decoder.conv_in, *decoder.middle, *decoder.stages, *_tail(decoder)]
    theirs = dict(_numbered("encoder_layers", of_encoder))
    theirs |= dict(_numbered("decoder_layers", of_decoder))
    # Of all their convolutions one is torch's own.
    theirs[encoder.conv_out] = theirs[encoder.conv_out].removesuffix(".conv")
    ours = {module: name for name, module in model.named_modules()}
    return {
        f"{ours[module]}.{parameter}": f"{name}.{'beta' if parameter == 'slope' else parameter}"
        for module, name in theirs.items()
        for parameter, _ in module.named_parameters(recurse=False)
    }


def from_published(found: Mapping[str, Any], model: CausalCnnTokenizer, where: str) -> dict[str, Tensor]:
    """The state of ``model`` from what their file holds, in fp32, for pixels in [-1, 1].

    UsageError, which begins with ``where``, where weights are missing, left over, or of another size.
    """
    inside = found.get("model_state_dict", found)
    found = {str(name).removeprefix(PREFIX): tensor for name, tensor in inside.items() if torch.is_tensor(tensor)}
    names, shapes = published_names(model), dict(model.named_parameters())
    state = {}
    for ours, theirs in names.items():
        shape = shapes[ours].shape
        wanted = (1, *shape, 1, 1, 1) if ours.endswith(".slope") else tuple(shape)
        there = tuple(found[theirs].shape) if theirs in found else None
        if there != wanted:
            what = f"is {there}, {wanted} is needed" if there else "is missing"
            raise UsageError(f"{where}: {theirs} {what}; `model` has to describe the network of the weights")
        state[ours] = found[theirs].double().reshape(shape)
    if more := sorted(found.keys() - set(names.values())):
        raise UsageError(
            f"{where}: {more[0]} has no place in this network; `model` has to describe that of the weights"
        )
    # Their [0, 1] is (x + 1) / 2, and 2 y - 1 ours. Edges are replicated, so that it is exact there too.
    first, last = "encoder.conv_in", "decoder.conv_out"
    state[f"{first}.bias"] = state[f"{first}.bias"] + state[f"{first}.weight"].sum(dim=(1, 2, 3, 4)) / 2
    state[f"{first}.weight"] = state[f"{first}.weight"] / 2
    state[f"{last}.weight"] = 2 * state[f"{last}.weight"]
    state[f"{last}.bias"] = 2 * state[f"{last}.bias"] - 1
    return {name: tensor.float() for name, tensor in state.items()}


def _tail(network: Encoder | Decoder) -> list[nn.Module]:
    return [network.norm_out, network.act_out, network.conv_out]


def _numbered(folder: str, layers: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Each module that has parameters of its own, and theirs of its name."""
    number = 0
    for layer in layers:
        name = f"{folder}.{number}"
        match layer:
            case ResidualBlock():
                parts = {getattr(layer, ours): f"{name}.{theirs}" for ours, theirs in OF_BLOCK.items()}
                if isinstance(layer.shortcut, CausalConv3d):
                    parts[layer.shortcut] = f"{name}.residual_fn.0"
            case CausalUpsample():
                parts = {layer.conv: name}
                number += 1
            case _:
                parts = {layer: name}
        for module, where in parts.items():
            yield module, f"{where}.conv" if isinstance(module, CausalConv3d) else where
        number += 1
