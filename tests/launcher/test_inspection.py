import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, Moments, Shard, file_sha256, write_manifest
from launcher.inspection import describe, inspect
from stpredict.run import Run

FIELD = {"channels": ["t2m", "u10"], "units": ["K", "m/s"], "dtype": "float32"}


def make_set(folder, **description):
    """A set of two shards, which hold no sample, and its manifest."""
    folder.mkdir(parents=True)
    shards = []
    for name in ("shard-000000", "shard-000001"):
        with tarfile.open(path := folder / f"{name}.tar", "w") as tar:
            tar.add(__file__, "a.py")
        sizes = {"window_bytes": [512, 1024], "window_samples": [2, 3]}
        about = {"samples": 5, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        shards.append(Shard(name=name, **about, **sizes))
    manifest = Manifest(**{"kind": "clips", "samples": 10, "shards": shards, **description})
    write_manifest(folder, manifest)
    return path


def test_shard_and_latent_sets_are_told_apart_and_a_run_shows_its_sets(tmp_path):
    make_set(tmp_path / "train", classes=["jump", "run"], skipped=2)
    make_set(tmp_path / "val", kind="latents", grid=(5, 8, 8), codebook_size=1000)
    Run(tmp_path).update_status(kind="shard", state="done", step=3, steps=3)
    run, train, val = describe(str(tmp_path))
    assert (run["what"], run["state"]) == ("run of kind shard", "done")
    assert (train["what"], train["classes"]) == ("shard set", "jump, run")
    assert (train["samples"], train["samples per shard"], train["windows"]) == (10, "5", 4)
    assert (train["bytes per window"], train["samples per window"]) == ("512 to 1,024", "2 to 3")
    assert train["skipped"] == "2 (`skipped` in shard-*.json names them)"
    assert (val["what"], val["token grid"], val["codebook"]) == ("latent set", "5 x 8 x 8", 1000)
    assert describe(str(tmp_path / "val")) == [val]
    assert describe(f"{tmp_path}/{{train,val}}") == [train, val]


def test_a_field_shows_unit_mean_and_deviation_of_each_channel(tmp_path):
    moments = Moments(count=4, mean=[280.0, -1.5], m2=[400.0, 0.0])
    make_set(tmp_path / "train", **FIELD, moments=moments)
    (facts,) = describe(str(tmp_path))
    assert facts["type of arrays"] == "float32"
    assert facts["channel t2m"] == "mean 280, std 10 K"
    assert facts["channel u10"] == "mean -1.5, std 0 m/s"


def test_verify_names_shard_and_reason_also_as_json(tmp_path, capsys):
    make_set(tmp_path / "train")
    assert inspect(str(tmp_path), None, True, 1, True) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    where = {"set": str(tmp_path / "train"), "shard": "shard-000000.tar"}
    assert where | {"key": None, "reason": "bytes 0 to 512 hold 1 samples, 2 expected"} in problems
    assert inspect(str(tmp_path), None, True, 1, False) == 1
    assert f"{tmp_path}/train: shard-000000.tar: a: has .py; a sample has .json" in capsys.readouterr().err


def test_a_run_whose_parts_are_not_merged_says_what_to_do(tmp_path):
    part = Run(tmp_path / "parts" / "0-of-2")
    part.write_config("kind: shard\n")
    with pytest.raises(UsageError, match=f"not merged yet: `stpredict merge {tmp_path}`"):
        describe(str(tmp_path))


def test_a_url_without_a_set_is_said_so(monkeypatch):
    monkeypatch.setattr("launcher.inspection.find_manifest", lambda _: None)
    with pytest.raises(UsageError, match=r"s3://bucket/x: no shard set there"):
        describe("s3://bucket/x")


def test_a_run_shows_its_last_metrics_and_only_complete_checkpoints(tmp_path):
    run = Run(tmp_path)
    run.update_status(kind="tokenizer", state="failed", error="no room", step=20, steps=30)
    rows = [{"step": 10, "split": "train", "loss": 2}, {"step": 20, "split": "train", "loss": 1.5}]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, marker in ((10, "COMPLETE"), (20, "state.json")):
        folder = run.checkpoints / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / marker).touch()
    (facts,) = describe(str(tmp_path))
    assert facts["checkpoints"] == "step_00000010"
    assert facts["error"] == "no room"
    assert "loss 1.5" in facts["last train"]


def test_a_checkpoint_shows_whether_it_is_complete(tmp_path):
    folder = tmp_path / "step_00000010"
    folder.mkdir()
    state = {"step": 10, "samples_consumed": 160, "world_size": 2, "zero_stage": 3, "export": {}}
    (folder / "state.json").write_text(json.dumps(state))
    (facts,) = describe(str(folder))
    assert not facts["complete"]
    assert (facts["samples_consumed"], facts["world_size"], facts["zero_stage"]) == (160, 2, 3)
    (folder / "COMPLETE").touch()
    assert describe(str(folder))[0]["complete"]


def test_an_export_shows_its_size_from_the_header_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: prior\nstep: 7\nmodel: {width: 4}\n")
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (facts,) = describe(str(tmp_path))
    assert (facts["what"], facts["parameters"], facts["tensors"], facts["types"]) == ("export of a prior", 10, 2, "F32")


def test_a_pipeline_run_shows_the_state_of_each_job(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("name: demo\njobs: {one: {}, two: {}}\n")
    Run(tmp_path / "one").update_status(kind="shard", state="done")
    (facts,) = describe(str(tmp_path))
    assert (facts["what"], facts["one"], facts["two"]) == ("run of pipeline demo", "done", "not started")


def test_what_is_none_of_ours_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="not a shard set"):
        describe(str(tmp_path))
    with pytest.raises(UsageError, match="no such file or folder"):
        describe(str(tmp_path / "x"))
    Run(tmp_path).update_status(kind="prior")
    with pytest.raises(UsageError, match="--verify needs a shard set"):
        inspect(str(tmp_path), None, True, None, False)
