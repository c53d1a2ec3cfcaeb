"""OpenSTL's SimVP by its names and shapes alone, part by part in the order in which its forward pass uses them."""

from collections.abc import Iterator

import torch
from torch import Tensor

Part = tuple[str, dict[str, tuple[int, ...]]]  # a module's name, and the shapes of what it holds


def conv(name: str, out: int, into: int, kernel: int = 1, bias: bool = True) -> Part:
    return name, {"weight": (out, into, kernel, kernel)} | ({"bias": (out,)} if bias else {})


def depthwise(name: str, channels: int, kernel: int) -> Part:
    return conv(name, channels, 1, kernel)


def linear(name: str, out: int, into: int, bias: bool = True) -> Part:
    return name, {"weight": (out, into)} | ({"bias": (out,)} if bias else {})


def norm(name: str, channels: int) -> Part:
    return name, {"weight": (channels,), "bias": (channels,)}


def batch_norm(name: str, channels: int) -> Part:
    statistics = {"running_mean": (channels,), "running_var": (channels,), "num_batches_tracked": ()}
    return name, norm(name, channels)[1] | statistics


def value(name: str, *shape: int) -> Part:
    """A parameter of the block itself, or of a part of it."""
    *module, parameter = name.split(".")
    return ".".join(module), {parameter: shape}


def block(kind: str, c: int, ratio: int, grid: tuple[int, int], window: int, local: bool) -> list[Part]:
    m = ratio * c
    large = [
        depthwise("attn.spatial_gating_unit.conv0", c, 5),
        depthwise("attn.spatial_gating_unit.conv_spatial", c, 7),
    ]
    mlp = [conv("mlp.fc1", m, c), depthwise("mlp.dwconv.dwconv", m, 3), conv("mlp.fc2", c, m)]
    dense = [linear("mlp.fc1", m, c), linear("mlp.fc2", c, m)]
    heads = [linear("attn.qkv", 3 * c, c), linear("attn.proj", c, c)]
    match kind:
        case "gsta" | "van" | "tau":
            squeezed = c // max(c // 16, 4)
            fc = [("2", c, squeezed), ("0", squeezed, c)][::-1]
            among = [linear(f"attn.spatial_gating_unit.fc.{n}", o, i, bias=False) for n, o, i in fc]
            unit = [conv("attn.spatial_gating_unit.conv1", 2 * c if kind == "gsta" else c, c)]
            return [
                *(batch_norm("norm1", c), conv("attn.proj_1", c, c)),
                *(among if kind == "tau" else []),
                *(*large, *unit, conv("attn.proj_2", c, c), value("layer_scale_1", c)),
                *(batch_norm("norm2", c), *mlp, value("layer_scale_2", c)),
            ]
        case "vit":
            return [norm("norm1", c), *heads, norm("norm2", c), *dense]
        case "swin":
            table = value("attn.relative_position_bias_table", (2 * window - 1) ** 2, 8)
            return [norm("norm1", c), table, *heads, norm("norm2", c), *dense]
        case "uniformer" if local:
            mixer = [conv("conv1", c, c), depthwise("attn", c, 5), conv("conv2", c, c)]
            pointwise = [conv("mlp.fc1", m, c), conv("mlp.fc2", c, m)]
            return [depthwise("pos_embed", c, 3), batch_norm("norm1", c), *mixer, batch_norm("norm2", c), *pointwise]
        case "uniformer":
            first = [depthwise("pos_embed", c, 3), norm("norm1", c), *heads, value("gamma_1", c)]
            return [*first, norm("norm2", c), *dense, value("gamma_2", c)]
        case "mlp_mixer":
            n = grid[0] * grid[1]
            tokens = [linear("mlp_tokens.fc1", c // 2, n), linear("mlp_tokens.fc2", n, c // 2)]
            channels = [linear("mlp_channels.fc1", m, c), linear("mlp_channels.fc2", c, m)]
            return [norm("norm1", c), *tokens, norm("norm2", c), *channels]
        case "conv_mixer":
            return [
                depthwise("conv_dw", c, 11),
                batch_norm("norm_1", c),
                conv("conv_pw", c, c),
                batch_norm("norm_2", c),
            ]
        case "poolformer":
            pointwise = [conv("mlp.fc1", m, c), conv("mlp.fc2", c, m)]
            return [
                norm("norm1", c),
                value("layer_scale_1", c),
                norm("norm2", c),
                *pointwise,
                value("layer_scale_2", c),
            ]
        case "convnext":
            pointwise = [conv("mlp.fc1", m, c), conv("mlp.fc2", c, m)]
            return [depthwise("conv_dw", c, 7), norm("norm", c), *pointwise, value("gamma", c)]
        case "hornet":
            mixes = [conv(f"gnconv.pws.{n}", c // (4 >> n), c // (8 >> n)) for n in range(3)]
            return [
                *(norm("norm1", c), conv("gnconv.proj_in", 2 * c, c), depthwise("gnconv.dwconv", 15 * c // 8, 7)),
                *(*mixes, conv("gnconv.proj_out", c, c), value("gamma1", c)),
                *(norm("norm2", c), linear("pwconv1", m, c), linear("pwconv2", c, m), value("gamma2", c)),
            ]
        case "moganet":
            reaches = [(0, c, 5), (1, 3 * c // 8, 5), (2, c // 2, 7)]
            return [
                *(batch_norm("norm1", c), conv("attn.proj_1", c, c), value("attn.sigma", 1, c, 1, 1)),
                conv("attn.gate", c, c),
                *(depthwise(f"attn.value.DW_conv{n}", width, kernel) for n, width, kernel in reaches),
                *(conv("attn.value.PW_conv", c, c), conv("attn.proj_2", c, c), value("layer_scale_1", 1, c, 1, 1)),
                *(batch_norm("norm2", c), conv("mlp.fc1", m, c), depthwise("mlp.dwconv", m, 3)),
                *(conv("mlp.decompose", 1, m), value("mlp.sigma", 1, m, 1, 1), conv("mlp.fc2", c, m)),
                value("layer_scale_2", 1, c, 1, 1),
            ]


def inception(into: int, hidden: int, out: int, kernels=(3, 5, 7, 11), groups=8) -> Iterator[Part]:
    yield conv("conv1", hidden, into)
    for n, kernel in enumerate(kernels):
        yield conv(f"layers.{n}.conv", out, hidden // groups, kernel)
        yield norm(f"layers.{n}.norm", out)


def within(folder: str, parts) -> Iterator[Part]:
    for name, shapes in parts:
        yield f"{folder}.{name}".rstrip("."), shapes


def layout(kind: str, config, window: int = 4) -> list[Part]:
    """Of the whole model."""
    s, t, n = config.hid_S, config.hid_T, config.N_T
    stacked = s * config.input_frames
    parts: list[Part] = []
    for layer in range(config.N_S):
        parts += within(f"enc.enc.{layer}.conv", [conv("conv", s, s if layer else config.channels, 3), norm("norm", s)])
    if kind == "incepu":
        sizes = [("enc", i, t if i else stacked, t) for i in range(n)]
        sizes += [("dec", i, 2 * t if i else t, t if i < n - 1 else stacked) for i in range(n)]
        for half, i, into, out in sizes:
            parts += within(f"hid.{half}.{i}", inception(into, t // 2, out))
    else:
        for i in range(n):
            c = t if i else stacked
            inside = block(
                kind,
                c,
                int(config.translator.mlp_ratio) if kind != "conv_mixer" else 0,
                config.grid,
                window,
                i in (0, n - 1),
            )
            parts += within(f"hid.enc.{i}.block", inside)
            if i in (0, n - 1):
                parts += within(f"hid.enc.{i}", [conv("reduction", stacked if i else t, c)])
    for layer in range(config.N_S):
        up = layer % 2 == 0
        convolution = conv("conv.0", 4 * s, s, 3) if up else conv("conv", s, s, 3)
        parts += within(f"dec.dec.{layer}.conv", [convolution, norm("norm", s)])
    return [*parts, conv("dec.readout", config.channels, s)]


def state_dict(parts: list[Part]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module}.{name}": torch.tensor(7) if name == "num_batches_tracked" else torch.rand(shape, generator=generator)
        for module, shapes in parts
        for name, shape in shapes.items()
    }
