"""Every config of a forecaster is what papers and published code say: it loads, builds, and has their size."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from launcher.estimates import load_training
from launcher.jobs import load_job
from launcher.pipeline import load_pipeline
from stpredict.config import read_yaml
from stpredict.estimates.planned import plan_training
from stpredict.estimates.size import size_of
from stpredict.forecasters.scaling import read_scalings
from stpredict.jobs.config import ForecasterJobConfig

FOLDER = Path(__file__).parents[3] / "configs/forecasters"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if read_yaml(path).get("kind") == "forecaster")

#: Parameters, and multiply-adds of one sample in units of 10^9.
EXACT = {
    "moving_mnist_gsta": (46_769_665, 16.526),
    "moving_mnist_incepu": (57_946_113, 19.431),
    "moving_mnist_vit": (46_102_273, 16.928),
    "moving_mnist_swin": (46_105_409, 16.409),
    "moving_mnist_uniformer": (44_834_817, 16.449),
    "moving_mnist_mlp_mixer": (38_192_449, 14.651),
    "moving_mnist_conv_mixer": (3_919_361, 5.450),
    "moving_mnist_poolformer": (37_115_393, 14.076),
    "moving_mnist_convnext": (37_313_921, 14.124),
    "moving_mnist_van": (44_520_833, 15.951),
    "moving_mnist_hornet": (45_738_305, 16.271),
    "moving_mnist_moganet": (46_777_065, 16.519),
    "moving_mnist_tau": (44_656_001, 15.953),
    "taxibj_convnext": (7_843_554, 2.079),
    "weatherbench_s_t2m_gsta": (12_758_305, 7.006),
    "kth_incepu": (12_152_385, 62.835),
    "kitticaltech_gsta": (15_634_243, 96.243),
    "human36m_gsta": (28_763_907, 145.986),
    "weatherbench_s_t2m_gsta_svq": (14_372_529, 16.86),
    "taxibj_convnext_svq": (9_457_778, 3.72),
    "taxibj_gsta_svq": (11_575_282, None),
    "kth_incepu_svq": (13_318_705, 110),
    "kitticaltech_gsta_svq": (16_800_563, 156),
    "human36m_gsta_svq": (30_702_227, 178),
}
#: As OpenSTL's and SimVPv2's tables print them: millions of parameters, 10^9 multiply-adds.
PRINTED = {
    "moving_mnist_gsta_large": (None, 152.20),
    "taxibj_incepu": (13.79, 3.61),
    "taxibj_gsta": (9.96, 2.62),
    "taxibj_vit": (9.66, 2.80),
    "taxibj_uniformer": (9.52, 2.71),
    "weatherbench_s_t2m_incepu": (14.67, 8.03),
    "weatherbench_s_t2m_vit": (12.41, 7.99),
    "weatherbench_s_t2m_swin": (12.42, 6.88),
    "weatherbench_s_t2m_uniformer": (12.02, 7.45),
    "weatherbench_s_t2m_mlp_mixer": (11.10, 5.92),
    "weatherbench_s_t2m_conv_mixer": (1.13, 0.95),
    "weatherbench_s_t2m_poolformer": (9.98, 5.61),
    "weatherbench_s_t2m_convnext": (10.09, 5.66),
    "weatherbench_s_t2m_van": (12.15, 6.70),
    "weatherbench_s_t2m_hornet": (12.42, 6.84),
    "weatherbench_s_t2m_moganet": (12.76, 7.01),
    "weatherbench_s_t2m_tau": (12.22, 6.70),
    "weatherbench_s_uv10_swin": (12.42, 6.89),
}
#: Samples of an epoch and epochs, by how names begin.
EPOCHS = {
    "moving_mnist": (10_000, 200),
    "taxibj": (20_461, 50),
    "weatherbench_s": (52_559, 50),
    "weatherbench_1979": (324_313, 50),
    "weatherbench_m": (54_019, 50),
    "kth": (4_940, 100),
    "kitticaltech": (3_160, 100),
    "human36m": (73_404, 50),
}
#: Peak learning rates of trainings with SVQ; a translator's of table 2 is that of the training without.
SVQ_RATES = {
    "weatherbench_s_t2m_gsta": 5e-3,
    "weatherbench_s_r_swin": 1e-3,
    "weatherbench_s_uv10_swin": 1e-3,
    "weatherbench_s_tcc_gsta": 1e-2,
    "weatherbench_m_moganet": 5e-3,
    "taxibj_convnext": 1e-3,
    "kth_incepu": 5e-4,
    "kitticaltech_gsta": 1.25e-3,
    "human36m_gsta": 2.5e-4,
}
DROP_PATHS = {
    "weatherbench_s_t2m_gsta": 0.1,
    "weatherbench_s_r_swin": 0.2,
    "weatherbench_s_uv10_swin": 0.2,
    "weatherbench_s_tcc_gsta": 0.1,
    "weatherbench_m_moganet": 0.1,
    "taxibj_convnext": 0.1,
    "kitticaltech_gsta": 0.2,
    "human36m_gsta": 0.1,
}
WITH_SVQ = [name.removesuffix("_svq") for name in NAMES if name.endswith("_svq")]


@cache
def config(name: str) -> ForecasterJobConfig:
    return load_training(FOLDER / f"{name}.yaml")


def published(name: str) -> bool:
    return any(name.startswith(data) for data in EPOCHS) and "tiny" not in name


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_builds_and_says_how_its_data_is_made(name):
    training = config(name)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert str(training.run) == f"runs/{name}"
    assert text.startswith("# ")
    assert training.data.made_with
    assert any(p.requires_grad for p in plan_training(training).task.model.parameters())


def commands() -> dict[str, set[str]]:
    """By command that makes shards: where trainings look for what it makes."""
    found: dict[str, set[str]] = {}
    for name in NAMES:
        data = config(name).data
        for command in re.findall("`(.*?)`", data.made_with):
            found.setdefault(command, set()).add(data.shards)
    return found


@pytest.mark.parametrize("command", commands())
def test_the_command_that_makes_the_shards_makes_those_that_are_looked_for(command):
    program, verb, path, *overrides = shlex.split(command)
    assert (program, verb) == ("stpredict", "shard")
    made = load_job(FOLDER.parents[1] / path, overrides, "shard")
    assert {str(made.run)} == commands()[command]


@pytest.mark.parametrize("name", EXACT)
def test_parameters_and_multiply_adds_are_the_published(name):
    size = size_of(plan_training(config(name)))
    parameters, giga_macs = EXACT[name]
    assert size.parameters == parameters
    if giga_macs:
        assert size.macs_forward / 1e9 == pytest.approx(giga_macs, rel=0.005)


@pytest.mark.parametrize("name", PRINTED)
def test_sizes_are_those_that_tables_print(name):
    size = size_of(plan_training(config(name)))
    millions, giga_macs = PRINTED[name]
    assert size.macs_forward / 1e9 == pytest.approx(giga_macs, rel=0.005, abs=0.01)
    if millions:
        assert size.parameters / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if published(name)])
def test_it_is_trained_as_long_as_published_16_samples_at_a_time(name):
    samples, epochs = next(given for data, given in EPOCHS.items() if name.startswith(data))
    training = config(name).training
    assert training.batch_size == 16
    assert training.steps == pytest.approx(samples * epochs / 16, abs=1)
    assert (training.optimizer.kind, training.optimizer.weight_decay) == ("adam", 0)
    assert training.schedule.kind == ("one_cycle" if name.startswith(("moving", "kth", "kitti")) else "cosine")
    if training.schedule.kind == "cosine":
        assert training.schedule.final * training.optimizer.lr == pytest.approx(1e-6)


@pytest.mark.parametrize("name", WITH_SVQ)
def test_with_svq_only_what_the_paper_changes_is_another(name):
    without, training = config(name), config(f"{name}_svq")
    mse = "_tcc_" in name  # alone trained with it
    assert (training.loss.mse, training.loss.mae) == ((1, 0) if mse else (0, 1))
    assert (without.loss.mse, without.loss.mae) == (1, 0)
    assert training.model.model_copy(update={"quantizer": None}) == without.model
    assert training.data == without.data
    stopping = training.training.early_stopping
    assert (stopping.metric, stopping.mode, stopping.patience) == ("loss", "min", 10)
    quantizer = training.model.quantizer
    codes = 1_000 if "tiny" in name else 6_000 if name.startswith(("kth", "kitti")) else 10_000
    assert (quantizer.codebook_size, quantizer.hidden, quantizer.learnable) == (codes, 128, True)
    init = "normal" if "t2m" in name else "kaiming_uniform"
    assert (quantizer.init, quantizer.place) == (init, "before")
    assert training.training.optimizer.lr == SVQ_RATES.get(name, without.training.optimizer.lr)


@pytest.mark.parametrize("name", DROP_PATHS)
def test_drop_paths_are_those_of_table_10(name):
    assert config(name).model.translator.drop_path == config(f"{name}_svq").model.translator.drop_path
    assert config(name).model.translator.drop_path == DROP_PATHS[name]


def test_a_frozen_codebook_is_not_trained():
    frozen = load_training(FOLDER / "weatherbench_s_t2m_gsta_svq.yaml", ["model.quantizer.learnable=false"])
    model = plan_training(frozen).task.model
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14_052_529


@pytest.mark.parametrize("name", ["kitticaltech_gsta", "human36m_gsta_svq", "robonet_gsta", "bridgedata_gsta"])
def test_where_there_is_no_reader_yet_training_says_so_in_a_line(name, tmp_path):
    training = config(name)
    data = training.data.model_copy(update={"shards": str(tmp_path)})
    with pytest.raises(UsageError, match=r"no reader for .* yet") as raised:
        read_scalings(data, training.model.channels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "given", "models"),
    [
        (
            "forecaster_tiny",
            "vars.mnist=/data",
            {"gsta": "moving_mnist_gsta_tiny", "incepu": "moving_mnist_incepu_tiny"},
        ),
        ("forecaster_era5_tiny", "vars.field=f.nc", {"gsta": "era5_t2m_gsta_tiny", "svq": "era5_t2m_gsta_tiny_svq"}),
    ],
)
def test_pipelines_train_the_small_configs_alike_and_judge_them_on_the_same_clips(name, given, models):
    jobs = {job.name: job.config for job in load_pipeline(FOLDER.parent / f"pipelines/{name}.yaml", [given])[-1]}
    trained = [jobs[job] for job in models]
    assert [job.model for job in trained] == [config(of).model for of in models.values()]
    assert trained[0].loss == trained[1].loss
    assert trained[0].training.optimizer == trained[1].training.optimizer
    assert trained[0].training.steps == trained[1].training.steps
    forecasts = [jobs[f"forecast_{job}"] for job in models]
    assert forecasts[0].data == forecasts[1].data
    assert [forecast.forecaster for forecast in forecasts] == [job.run for job in trained]
    assert jobs["evaluation"].generated == forecasts[0].run
    assert list(jobs["evaluation"].others.values()) == [forecasts[1].run]
