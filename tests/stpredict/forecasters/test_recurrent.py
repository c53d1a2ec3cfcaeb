import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.forecasters.build import build_forecaster
from stpredict.forecasters.config import ConvLstmConfig, PredRnnConfig
from stpredict.forecasters.published_macs import published_macs
from stpredict.forecasters.recurrent import Recurrent
from stpredict.forecasters.recurrent_cells import ConvLstmCell, SpatiotemporalLstmCell
from stpredict.training.activation_checkpointing import recompute
from stpredict.training.computing import ActivationCheckpointingConfig
from stpredict.training.flops import ShapesOnly, count_flops

CONFIGS = {"conv_lstm": ConvLstmConfig, "pred_rnn": PredRnnConfig}
KINDS = list(CONFIGS)
SMALL = {
    **{"channels": 2, "input_frames": 3, "output_frames": 3, "size": (6, 8)},
    **{"hidden": (4, 4), "kernel": 3, "patch": 2},
}


def small(kind: str, seed: int = 0, **changes) -> Recurrent:
    torch.manual_seed(seed)
    return build_forecaster(CONFIGS[kind](**SMALL | changes)).double().eval()


def video(model: Recurrent, batch: int = 2) -> Tensor:
    """As in training: all frames but the last."""
    config = model.config
    frames = config.input_frames + config.output_frames - 1
    return torch.randn(batch, config.channels, frames, *config.size, dtype=torch.float64)


def of_gate(weight: Tensor, x: Tensor, number: int, of: int) -> Tensor:
    """One gate's own convolution."""
    return F.conv2d(x, weight.chunk(of)[number], padding=weight.shape[-1] // 2)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def conv_lstm(w: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3 of the paper without W_ci, W_cf, W_co and biases."""
    i, f, g, o = (of_gate(w["of_input.weight"], x, n, 4) + of_gate(w["of_state.weight"], h, n, 4) for n in range(4))
    c = sigma(f) * c + sigma(i) * torch.tanh(g)
    return sigma(o) * torch.tanh(c), c


def st_lstm(w: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of PredRNN's section 3.1, and 1 added to what the forget gates see."""

    def of_x(n: int) -> Tensor:
        return of_gate(w["of_input.weight"], x, n, 7)

    def of_h(n: int) -> Tensor:
        return of_gate(w["of_state.weight"], h, n, 4)

    i, f, g = sigma(of_x(0) + of_h(0)), sigma(of_x(1) + of_h(1) + 1), torch.tanh(of_x(2) + of_h(2))
    c = f * c + i * g
    i, f, g = (of_x(3 + n) + of_gate(w["of_memory.weight"], m, n, 3) for n in range(3))
    m = sigma(f + 1) * m + sigma(i) * torch.tanh(g)
    of_c, of_m = w["of_both.weight"].chunk(2, dim=1)
    padding = of_c.shape[-1] // 2
    o = sigma(of_x(6) + of_h(3) + F.conv2d(c, of_c, padding=padding) + F.conv2d(m, of_m, padding=padding))
    of_c, of_m = w["joined.weight"].chunk(2, dim=1)
    return o * torch.tanh(F.conv2d(c, of_c) + F.conv2d(m, of_m)), c, m


@pytest.mark.parametrize(
    ("cell", "written_out", "states"), [(ConvLstmCell, conv_lstm, 2), (SpatiotemporalLstmCell, st_lstm, 3)]
)
def test_a_cell_is_the_papers_equations_gate_by_gate(cell, written_out, states):
    torch.manual_seed(0)
    layer = cell(5, 4, 3).double()
    given = [torch.randn(2, 5, 6, 7, dtype=torch.float64), *torch.randn(states, 2, 4, 6, 7, dtype=torch.float64)]
    got = layer(*given)
    expected = written_out(dict(layer.named_parameters()), *given)
    assert len(got) == states
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def fold(frame: Tensor, patch: int) -> Tensor:
    """Pixel by pixel: (b, c, h, w) to (b, p * p * c, h / p, w / p)."""
    parts = [frame[:, :, row::patch, column::patch] for row in range(patch) for column in range(patch)]
    return torch.cat(parts, dim=1)


def unfold(patches: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = patches.shape
    frame = patches.new_empty(batch, channels // patch**2, height * patch, width * patch)
    for number, part in enumerate(patches.chunk(patch**2, dim=1)):
        frame[:, :, number // patch :: patch, number % patch :: patch] = part
    return frame


def rolled(model: Recurrent, frames: Tensor, shown: Tensor) -> Tensor:
    """What it predicts of the frame after each of ``frames``, written out with the cells above."""
    config = model.config
    weights = [dict(cell.named_parameters()) for cell in model.cells]
    batch, zigzag = len(frames), isinstance(config, PredRnnConfig)
    grid = [side // config.patch for side in config.size]
    h, c = ([torch.zeros(batch, n, *grid, dtype=torch.float64) for n in config.hidden] for _ in range(2))
    m = torch.zeros_like(h[0])
    made: list[Tensor] = []
    for time in range(frames.shape[2]):
        frame = frames[:, :, time].clone()
        for row in range(batch):
            if time >= config.input_frames and not shown[row, time - config.input_frames]:
                frame[row] = made[-1][row]
        x = fold(frame, config.patch)
        for layer, w in enumerate(weights):
            if zigzag:
                h[layer], c[layer], m = st_lstm(w, x, h[layer], c[layer], m)
            else:
                h[layer], c[layer] = conv_lstm(w, x, h[layer], c[layer])
            x = h[layer]
        made.append(unfold(F.conv2d(x, model.readout.weight), config.patch))
    return torch.stack(made, dim=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_frames", [1, 3])
def test_in_training_every_next_frame_is_predicted_from_the_true_frames_that_are_shown_and_predictions_else(
    kind, output_frames
):
    model = small(kind, output_frames=output_frames)
    frames = video(model)
    shown = torch.tensor([[True, False], [False, True]])[:, : output_frames - 1]
    got = model(frames, shown).frames
    assert got.shape == frames.shape
    torch.testing.assert_close(got, rolled(model, frames, shown), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_is_of_the_output_frames_and_sees_the_input_frames_alone(kind):
    model = small(kind)
    frames = video(model)
    unseen = torch.zeros(2, 2, dtype=torch.bool)
    got = model(frames[:, :, :3])
    assert got.commitment is None
    torch.testing.assert_close(got.frames, rolled(model, frames, unseen)[:, :, 2:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.frames, model(frames, unseen).frames[:, :, 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_horizon_goes_on_from_the_same_predictions(kind):
    model, longer = small(kind), small(kind, output_frames=8)
    frames = video(model)[:, :, :3]
    got = longer(frames).frames
    assert got.shape[2] == 8
    torch.testing.assert_close(got[:, :, :3], model(frames).frames)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_invert_to_the_bit(kind):
    model = small(kind, size=(6, 10), patch=2)
    frame = torch.randn(2, 2, 6, 10)
    assert torch.equal(model._unfolded(model._folded(frame)), frame)
    assert torch.equal(model._folded(frame), fold(frame, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(6, 7), (5, 8), (5, 5)])
def test_frames_that_patches_do_not_divide_always_go_in_with_their_border_repeated(kind, size):
    """Predictions too: each time step by itself is that of an even grid."""
    height, width = size
    odd, even = small(kind, size=size), small(kind, size=(-(-height // 2) * 2, -(-width // 2) * 2))
    frames = video(odd)
    rows = torch.arange(even.config.size[0]).clamp(max=height - 1)
    columns = torch.arange(even.config.size[1]).clamp(max=width - 1)
    shown = torch.zeros(2, 2, dtype=torch.bool)
    got = odd(frames, shown).frames
    assert got.shape == frames.shape
    seen = frames[:, :, :3]
    for _ in range(3):  # each prediction goes in again as if it were true
        longer = small(kind, size=even.config.size, input_frames=seen.shape[2], output_frames=1)
        nothing = torch.zeros(2, 0, dtype=torch.bool)
        made = longer(seen[..., rows, :][..., columns], nothing).frames[..., :height, :width]
        torch.testing.assert_close(got[:, :, seen.shape[2] - 1], made[:, :, -1])
        seen = torch.cat([seen, made[:, :, -1:]], dim=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_weight_and_passes_through_predictions(kind):
    model = small(kind)
    frames = video(model).requires_grad_()
    shown = torch.zeros(2, 2, dtype=torch.bool)
    model(frames, shown).frames[:, :, -1].square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().amax() > 0, name
    of_frames = frames.grad.abs().amax(dim=(0, 1, 3, 4))
    assert (of_frames[:3] > 0).all()
    assert (of_frames[3:] == 0).all()  # none of those was shown


def learned(model: Recurrent) -> dict[str, Tensor]:
    """The gradient of every weight."""
    frames = torch.linspace(-1, 1, 2 * 2 * 5 * 6 * 8, dtype=torch.float64).mul(99).sin().view(2, 2, 5, 6, 8)
    model.train()(frames, torch.tensor([[True, False], [False, False]])).frames.square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["layers", "selective"])
def test_recomputed_cells_give_the_same_gradients(kind, policy):
    model = small(kind)
    recompute(model.layers(), ActivationCheckpointingConfig(policy=policy))
    assert_close(learned(model), learned(small(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_cells_are_few_graphs_for_all_layers_and_times_and_give_the_same(kind):
    plain, model = (small(kind, hidden=(4, 4, 4)) for _ in range(2))
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model.layers():
        layer.forward = torch.compile(layer.forward, backend=graphs, fullgraph=True)
    assert_close(learned(model), learned(plain))
    assert graphs.frame_count <= 3  # of the first layer, which sees true frames and predictions, and of the others
    frames = video(model)[:, :, :3]
    with torch.no_grad():
        torch.testing.assert_close(model(frames).frames, plain(frames).frames)
    assert graphs.frame_count <= 5


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


MOVING_MNIST = {"size": (64, 64)}
WEATHER = {"input_frames": 12, "output_frames": 12, "size": (32, 64), "patch": 2}
TAXI = {"channels": 2, "input_frames": 4, "output_frames": 4, "size": (32, 32), "patch": 2}
KTH = {"output_frames": 20, "size": (128, 128), "patch": 2}
CALTECH = {"channels": 3, "output_frames": 1, "size": (128, 160), "patch": 2}
HUMAN = {"channels": 3, "input_frames": 4, "output_frames": 4, "size": (256, 256), "patch": 4}
#: Published millions of parameters and GMACs: SimVPv2's table II for ConvLSTM's small and large; SVQ's table 12 and
#: OpenSTL's model zoo, WeatherBench-S's parameters of ConvLSTM left out, which are TaxiBJ's there.
PUBLISHED = [
    ("conv_lstm", MOVING_MNIST | {"hidden": (64,) * 4}, None, 14.45),
    ("conv_lstm", MOVING_MNIST, 15.08, 56.8),
    ("conv_lstm", MOVING_MNIST | {"hidden": (192,) * 4}, 33.8, 127.01),
    ("pred_rnn", MOVING_MNIST, 23.8, 115.95),
    ("conv_lstm", WEATHER, None, 136),
    ("pred_rnn", WEATHER, 23.57, 278),
    ("conv_lstm", TAXI, 14.98, 20.74),
    ("pred_rnn", TAXI, 23.66, 42.40),
    ("conv_lstm", KTH, 14.9, 1368),
    ("pred_rnn", KTH, 23.6, 2800),
    ("conv_lstm", CALTECH, 15.0, 595),
    ("pred_rnn", CALTECH, 23.7, 1216),
    ("conv_lstm", HUMAN, 15.5, 347),
    ("pred_rnn", HUMAN, 24.6, 704),
]


def closed_form(config: ConvLstmConfig | PredRnnConfig) -> int:
    """Weights: k x k of every gate's convolutions, 1 x 1 of the read-out and of PredRNN's joining of its memories."""
    folded = config.channels * config.patch**2
    total = folded * config.hidden[-1]
    for channels, hidden in zip((folded, *config.hidden), config.hidden, strict=False):
        if isinstance(config, ConvLstmConfig):
            total += config.kernel**2 * hidden * (4 * channels + 4 * hidden)
        else:
            total += config.kernel**2 * hidden * (7 * channels + 4 * hidden + 3 * hidden + 2 * hidden) + 2 * hidden**2
    return total


@pytest.mark.parametrize(("kind", "sizes", "millions", "giga_macs"), PUBLISHED)
def test_weights_are_the_closed_form_and_weights_and_multiply_adds_the_published(kind, sizes, millions, giga_macs):
    config = CONFIGS[kind](**sizes)
    with torch.device("meta"):
        model = build_forecaster(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert parameters == closed_form(config)
    frames = config.input_frames + config.output_frames - 1
    macs = parameters * frames * math.prod(config.size) / config.patch**2
    assert macs / 1e9 == pytest.approx(giga_macs, rel=2.5e-3)  # as far as they are printed
    if millions:
        if kind == "conv_lstm":  # the published count holds two convolutions of each cell that are never computed
            parameters += sum(2 * hidden**2 * (config.kernel**2 + 1) for hidden in config.hidden)
        assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_are_every_weight_at_every_place_and_time_in_training_and_in_a_forecast(kind):
    model = small(kind)
    places = 5 * 3 * 4
    macs = sum(weight.numel() for weight in model.parameters()) * places
    shapes, frames = ShapesOnly(model), video(model, batch=1)
    assert count_flops(shapes, (frames, torch.zeros(1, 2, dtype=torch.bool)), {}) == 2 * macs
    assert count_flops(shapes, (frames[:, :, :3],), {}) == 2 * macs
    assert published_macs(model, macs) == macs


def test_the_defaults_of_pred_rnn_are_the_published_ones():
    assert closed_form(PredRnnConfig()) == 23_838_720


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("conv_lstm", {"kernel": 4}, "kernel 4: .* odd"),
        ("pred_rnn", {"hidden": (4, 8)}, r"hidden \[4, 8\]: one memory goes through all layers"),
        ("conv_lstm", {"size": (6, 7), "padding": "refuse"}, "size 6x7: sides must be multiples of 2"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_in_a_line(kind, changes, message):
    with pytest.raises(UsageError, match=message):
        validate(CONFIGS[kind], SMALL | changes, "x.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_other_frames_than_the_models_are_refused(kind):
    model = small(kind)
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 8\), this model takes \(2, 3, 6, 8\)"):
        model(torch.zeros(1, 2, 4, 6, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 8\), this model takes \(2, 5, 6, 8\)"):
        model(torch.zeros(1, 2, 3, 6, 8, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.bool))
