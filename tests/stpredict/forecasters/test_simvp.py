import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.simvp import SimVP

SMALL = {"channels": 2, "input_frames": 3, "output_frames": 3, "size": (8, 12), "hid_S": 4, "hid_T": 16, "N_T": 2}


def small(seed: int = 0, **changes) -> SimVP:
    torch.manual_seed(seed)
    return SimVP(SimVPConfig(**SMALL | changes)).double().eval()


def given(model: SimVP, batch: int = 2) -> Tensor:
    config = model.config
    return torch.randn(batch, config.channels, config.input_frames, *config.size, dtype=torch.float64)


def conv_block(weights: dict[str, Tensor], name: str, x: Tensor, down: bool = False, up: bool = False) -> Tensor:
    """As the paper has it, in plain calls: convolution, PixelShuffle, normalisation of halves of the channels, SiLU."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], stride=2 if down else 1, padding=1)
    if up:
        n, c, h, w = x.shape
        x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    n, c, h, w = x.shape
    halves = x.view(n, 2, -1)
    halves = (halves - halves.mean(-1, keepdim=True)) / (halves.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = halves.view(n, c, h, w) * weights[f"{name}.norm.weight"].view(1, -1, 1, 1)
    x = x + weights[f"{name}.norm.bias"].view(1, -1, 1, 1)
    return x / (1 + (-x).exp())


@pytest.mark.parametrize("layers", [2, 4])
def test_encoder_and_decoder_are_the_papers_written_out_with_the_skip_added_before_the_last_block(layers):
    model = small(N_S=layers)
    weights, frames = dict(model.named_parameters()), given(model)
    got = model(frames).frames
    for row, sample in enumerate(frames):
        images = sample.transpose(0, 1)  # (t, c, h, w)
        skip = x = conv_block(weights, "encoder.blocks.0", images)
        for layer in range(1, layers):
            x = conv_block(weights, f"encoder.blocks.{layer}", x, down=layer in (1, 3))
        stacked = x.reshape(1, -1, *x.shape[2:])
        x = model.translator(stacked).view(x.shape)
        for layer in range(layers - 1):
            x = conv_block(weights, f"decoder.blocks.{layer}", x, up=layer in (0, 2))
        x = conv_block(weights, f"decoder.blocks.{layers - 1}", x + skip)
        x = F.conv2d(x, weights["decoder.readout.weight"], weights["decoder.readout.bias"])
        torch.testing.assert_close(got[row], x.transpose(0, 1), rtol=1e-9, atol=1e-11)


def test_a_longer_horizon_is_predicted_from_predictions_with_the_graph_kept():
    once, longer = small(), small(output_frames=8)  # 3 + 3 + 2
    frames = given(once).requires_grad_()
    first = once(frames).frames
    second = once(first).frames
    third = once(second).frames
    got = longer(frames).frames
    assert got.shape[2] == 8
    torch.testing.assert_close(got, torch.cat([first, second, third], dim=2)[:, :, :8])
    of_last = torch.autograd.grad(got[:, :, -1].sum(), frames)[0]
    expected = torch.autograd.grad(third[:, :, 1].sum(), frames)[0]
    torch.testing.assert_close(of_last, expected)
    assert expected.abs().sum() > 0


def test_of_a_shorter_horizon_the_first_frames_are_kept():
    whole, shorter = small(), small(output_frames=1)
    frames = given(whole)
    torch.testing.assert_close(shorter(frames).frames, whole(frames).frames[:, :, :1])


@pytest.mark.parametrize("size", [(8, 11), (7, 12), (5, 9)])
def test_frames_that_the_strides_do_not_divide_go_in_with_their_border_repeated_and_come_out_in_their_size(size):
    height, width = size
    odd = small(size=size, N_S=4)
    even = small(size=(-(-height // 4) * 4, -(-width // 4) * 4), N_S=4)
    frames = given(odd)
    rows = torch.arange(even.config.size[0]).clamp(max=height - 1)
    columns = torch.arange(even.config.size[1]).clamp(max=width - 1)
    expected = even(frames[..., rows, :][..., columns]).frames[..., :height, :width]
    torch.testing.assert_close(odd(frames).frames, expected)
    with pytest.raises(UsageError, match=rf"size {height}x{width}: sides must be multiples of 4"):
        validate(SimVPConfig, SMALL | {"size": size, "N_S": 4, "padding": "refuse"}, "x.yaml")


def test_other_frames_than_the_models_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 12\), this model takes \(2, 3, 8, 12\)"):
        model(torch.zeros(1, 2, 4, 8, 12, dtype=torch.float64))


def test_frames_are_encoded_each_by_itself():
    model = small()
    frames = given(model, batch=1)
    changed = frames.clone()
    changed[:, :, 1] += 1
    encoded, again = (model.encoder(x[0].transpose(0, 1))[0] for x in (frames, changed))
    assert torch.equal(encoded[[0, 2]], again[[0, 2]])
    assert not torch.equal(encoded[1], again[1])


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_quantizer_stands_where_the_config_says_and_the_skip_by_passes_it(place):
    quantizer = {"kind": "svq", "codebook_size": 16, "hidden": 8, "place": place}
    model = small(quantizer=quantizer)
    frames = given(model)
    seen = {}
    model.quantizer.register_forward_pre_hook(lambda _, args: seen.update(latents=args[0]))
    model(frames)
    encoded, _ = model.encoder(frames.transpose(1, 2).flatten(0, 1))
    stacked = encoded.view(2, -1, *encoded.shape[2:])
    expected = model.translator(stacked) if place == "after" else stacked
    torch.testing.assert_close(seen["latents"].flatten(1, 2), expected)
    before, after = model.latents(frames)
    torch.testing.assert_close(before, seen["latents"])
    torch.testing.assert_close(after, model.quantizer(before)[0])
    with torch.no_grad():
        for weight in model.quantizer.parameters():
            weight.zero_()
    assert model(frames).frames.flatten(2).std(dim=-1).min() > 0  # the skip alone still tells of the frames


@pytest.mark.parametrize("channels", [1, 2])
def test_every_layer_sees_a_pixels_channels_side_by_side(channels):
    model = small(channels=channels, output_frames=5)
    seen = []

    def look(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, c, h, w = inputs[0].shape
        seen.append(inputs[0].stride() == (c * h * w, 1, c * w, c))

    for layer in model.layers():
        layer.register_forward_pre_hook(look)
    model(given(model))
    assert len(seen) == 2 * len(model.layers())  # a pass after its own predictions, too
    assert all(seen)


def test_what_cannot_mean_what_it_says_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"kernels \[2, 4\]: features stay in their place under odd ones alone"):
        SimVPConfig(**SMALL, translator={"kind": "incepu", "kernels": (3, 2, 4)})
    with pytest.raises(UsageError, match=r"tau needs 4 channels at least: input_frames x hid_S are 12, hid_T is 3"):
        small(hid_T=3, translator={"kind": "tau"})
