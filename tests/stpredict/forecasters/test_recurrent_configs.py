"""The published trainings of ConvLSTM and PredRNN: sizes, patches and learning rates."""

import math
from pathlib import Path

import pytest

from launcher.estimates import load_training
from stpredict.estimates.planned import plan_training
from stpredict.estimates.size import size_of
from stpredict.forecasters.config import RecurrentConfig, ScheduledSamplingConfig
from stpredict.jobs.config import ForecasterJobConfig

FOLDER = Path(__file__).parents[3] / "configs/forecasters"

#: GMACs as SimVPv2's table II, SVQ's table 12 and OpenSTL's model zoo print them; learning rates of OpenSTL's configs
#: (that of KittiCaltech's PredRNN is its ConvLSTM's).
PUBLISHED = {
    "moving_mnist_conv_lstm_small": (14.45, 5e-4),
    "moving_mnist_conv_lstm": (56.8, 5e-4),
    "moving_mnist_conv_lstm_large": (127.01, 5e-4),
    "moving_mnist_pred_rnn": (115.95, 5e-4),
    "weatherbench_s_t2m_conv_lstm": (136, 5e-4),
    "weatherbench_s_t2m_pred_rnn": (278, 5e-4),
    "weatherbench_s_r_conv_lstm": (136, 5e-4),
    "weatherbench_s_r_pred_rnn": (278, 1e-3),
    "weatherbench_s_uv10_conv_lstm": (136, 5e-4),
    "weatherbench_s_uv10_pred_rnn": (279, 5e-4),
    "weatherbench_s_tcc_conv_lstm": (136, 1e-4),
    "weatherbench_s_tcc_pred_rnn": (278, 5e-4),
    "weatherbench_m_conv_lstm": (None, 5e-4),
    "weatherbench_m_pred_rnn": (None, 1e-4),
    "taxibj_conv_lstm": (20.74, 5e-4),
    "taxibj_pred_rnn": (42.40, 1e-4),
    "kth_conv_lstm": (1368, 1e-3),
    "kth_pred_rnn": (2800, 1e-3),
    "kitticaltech_conv_lstm": (595, 5e-3),
    "kitticaltech_pred_rnn": (1216, 5e-3),
    "human36m_conv_lstm": (347, 1e-4),
    "human36m_pred_rnn": (704, 1e-4),
}


def config(name: str) -> ForecasterJobConfig:
    return load_training(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_and_learning_rates_are_the_published(name):
    training, (giga_macs, rate) = config(name), PUBLISHED[name]
    model = training.model
    assert model.kind == ("pred_rnn" if name.endswith("pred_rnn") else "conv_lstm")
    parameters = sum(weight.numel() for weight in plan_training(training).task.model.parameters())
    frames = model.input_frames + model.output_frames - 1
    if giga_macs:  # every weight at every place and time, as test_recurrent.py shows
        assert parameters * frames * math.prod(model.grid) / 1e9 == pytest.approx(giga_macs, rel=3e-3)
    assert training.training.optimizer.lr == rate
    assert model.kernel == 5
    assert model.scheduled_sampling == ScheduledSamplingConfig()
    assert (training.loss.mse, training.loss.mae) == (1, 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_sees_what_simvp_is_trained_on(name):
    data, _, _ = name.partition("_conv_lstm")
    data, _, _ = data.partition("_pred_rnn")
    simvp = {"weatherbench_m": "moganet", "weatherbench_s_r": "swin", "weatherbench_s_uv10": "swin"}.get(data, "gsta")
    ours, theirs = config(name), config(f"{data}_{simvp}")
    assert ours.data == theirs.data
    for key in ("channels", "input_frames", "output_frames", "size"):
        assert getattr(ours.model, key) == getattr(theirs.model, key)
    for key in ("steps", "batch_size", "precision", "clip_norm", "validate_every"):
        assert getattr(ours.training, key) == getattr(theirs.training, key)
    if data != "weatherbench_m":  # which recurrent models do without a warm-up
        assert ours.training.schedule.warmup_steps == theirs.training.schedule.warmup_steps


def test_every_recurrent_config_is_held_by_this_test():
    names = {path.stem for path in FOLDER.glob("*.yaml") if path.stem.endswith(("lstm", "rnn", "small", "large"))}
    recurrent = {name for name in names if isinstance(config(name).model, RecurrentConfig)}
    assert recurrent == PUBLISHED.keys()


def test_the_estimate_counts_what_a_training_step_does():
    planned = plan_training(config("taxibj_pred_rnn"))
    size = size_of(planned)
    assert size.parameters == 23_658_496
    assert size.macs_forward / 1e9 == pytest.approx(42.40, abs=0.005)


@pytest.mark.parametrize(("kind", "times"), [("conv_lstm", 1), ("pred_rnn", 2)])
def test_the_tiny_one_has_as_many_multiply_adds_as_gsta_or_twice_as_many(kind, times):
    recurrent, gsta = (size_of(plan_training(config(f"moving_mnist_{name}_tiny"))) for name in (kind, "gsta"))
    assert recurrent.macs_forward == pytest.approx(times * gsta.macs_forward, rel=0.1)
    model, training = config(f"moving_mnist_{kind}_tiny").model, config(f"moving_mnist_{kind}_tiny").training
    assert model.scheduled_sampling.share(599) == pytest.approx(0, abs=1e-6)
    assert 600 / training.steps == 50_000 / 125_000
