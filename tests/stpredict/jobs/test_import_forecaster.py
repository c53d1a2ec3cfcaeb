"""Forecasters in the layout that OpenSTL saves, as exports."""

import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.exports import load_forecaster
from stpredict.forecasters.openstl import from_openstl, openstl_names
from stpredict.forecasters.simvp import SimVP
from stpredict.jobs.config import ForecasterJobConfig
from stpredict.jobs.import_weights import import_forecaster
from stpredict.run import Run
from tests.processes import succeeding
from tests.stpredict.forecasters.fields import make_field_shards

MODEL = {
    "kind": "simvp",
    "channels": 1,
    "input_frames": 2,
    "output_frames": 3,
    "size": [8, 8],
    "hid_S": 4,
    "hid_T": 12,
    "N_S": 2,
    "N_T": 2,
}


def config(run: Path, scaling: dict | None, shards: Path | str = "nowhere", **model) -> ForecasterJobConfig:
    data = {"shards": shards} | ({"scaling": scaling} if scaling else {})
    job = {"run": run, "data": data, "model": MODEL | model, "training": {"steps": 1, "batch_size": 1}}
    return validate(ForecasterJobConfig, job, "config")


@pytest.fixture
def published(tmp_path) -> Path:
    return save(tmp_path / "best.pth")


def save(path: Path, **model) -> Path:
    """As theirs is saved during a training; of running statistics that are no others'."""
    torch.manual_seed(0)
    ours = SimVP(config(path, None, **model).model)
    ours.train()(torch.rand(4, ours.config.channels, 2, *ours.config.size))
    names = openstl_names(ours)
    state = {f"model.{names[name]}": tensor for name, tensor in ours.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{}]}, path)
    return path


def test_an_import_is_an_export_with_the_weights_and_the_scaling_that_the_config_says(published, tmp_path):
    job = config(tmp_path / "run", {"kind": "unit"})
    assert import_forecaster(published, job) == tmp_path / "run" / "export"
    model, export = load_forecaster(tmp_path / "run")
    assert (export.offset, export.scale, export.clip.frames, export.step) == ((0.0,), (255.0,), 5, 0)
    expected = from_openstl(torch.load(published), SimVP(job.model), "file")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_values_of_fields_are_scaled_as_given_or_by_the_statistics_of_shards(published, tmp_path):
    affine = {"kind": "affine", "offset": [280.0], "scale": [10.0]}
    import_forecaster(published, config(tmp_path / "a", affine))
    export = load_forecaster(tmp_path / "a")[1]
    assert (export.offset, export.scale) == ((280.0,), (10.0,))
    shards = make_field_shards(tmp_path / "field")  # of temperatures around 280 K
    of_two = save(tmp_path / "two.pth", channels=2)
    import_forecaster(of_two, config(tmp_path / "b", None, shards, channels=2))
    export = load_forecaster(tmp_path / "b")[1]
    assert (export.channels, export.units) == (["warm", "damp"], ["K", "g/kg"])
    assert export.offset == pytest.approx((280.0, 5.0), rel=0.01)
    with pytest.raises(UsageError, match="holds 2 channels"):
        import_forecaster(published, config(tmp_path / "c", None, shards))
    assert not (tmp_path / "c").exists()


def test_without_shards_the_scaling_has_to_be_said(published, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.*say what the weights see: data\.scaling"):
        import_forecaster(published, config(tmp_path / "run", None))
    assert not (tmp_path / "run").exists()


def test_other_networks_and_runs_are_refused(published, tmp_path):
    with pytest.raises(UsageError, match=r"best\.pth: hid\.enc.* `model` has to describe"):
        import_forecaster(published, config(tmp_path / "run", {"kind": "unit"}, hid_T=16))
    assert not (tmp_path / "run").exists()
    recurrent = {name: MODEL[name] for name in ("channels", "input_frames", "output_frames", "size")}
    other = config(tmp_path / "run", {"kind": "unit"}).model_dump() | {"model": recurrent | {"kind": "pred_rnn"}}
    other = validate(ForecasterJobConfig, other, "config")
    with pytest.raises(UsageError, match="pred_rnn: weights of simvp are imported"):
        import_forecaster(published, other)
    Run(tmp_path / "run").update_status(kind="forecaster", state="done")
    with pytest.raises(UsageError, match="holds a run"):
        import_forecaster(published, config(tmp_path / "run", {"kind": "unit"}))


def test_the_command_imports_what_a_config_of_kind_forecaster_describes(published, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"kind: forecaster\nrun: {tmp_path / 'run'}\ndata: {{shards: s}}\nmodel: {MODEL}\n"
        "training: {steps: 1, batch_size: 1}\n".replace("'", "")
    )
    command = [sys.executable, "-m", "launcher", "import", str(published), str(path), "data.scaling.kind=unit"]
    assert succeeding(command).stdout.strip() == str(tmp_path / "run" / "export")
    assert load_forecaster(tmp_path / "run")[1].model.hid_T == 12
