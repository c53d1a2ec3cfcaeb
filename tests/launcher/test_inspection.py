import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, Shard, file_sha256
from launcher.inspection import describe, inspect
from stpredict.run import Run


def make_set(folder, **description):
    """A set of one shard, which is a real tar, and its manifest."""
    folder.mkdir(parents=True)
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "a.py")
    shard = Shard(name=path.stem, samples=0, bytes=path.stat().st_size, sha256=file_sha256(path), windows=[])
    manifest = Manifest(**{"kind": "clips", "samples": 0, "shards": [shard], **description})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return path


def test_shard_and_latent_sets_are_told_apart_and_a_run_shows_its_sets(tmp_path):
    make_set(tmp_path / "train", classes=["jump", "run"])
    make_set(tmp_path / "val", kind="latents", grid=(5, 8, 8), codebook_size=1000)
    Run(tmp_path).update_status(kind="shard", state="done", step=3, steps=3)
    run, train, val = describe(tmp_path)
    assert (run["what"], run["state"]) == ("run of kind shard", "done")
    assert (train["what"], train["classes"]) == ("shard set", "jump, run")
    assert (val["what"], val["token grid"], val["codebook"]) == ("latent set", "5 x 8 x 8", 1000)
    assert describe(tmp_path / "val") == [val]


def test_verify_finds_a_changed_shard(tmp_path, capsys):
    path = make_set(tmp_path / "train")
    assert inspect(tmp_path, None, True, False) == 0
    capsys.readouterr()
    damaged = bytearray(path.read_bytes())
    damaged[600] ^= 1
    path.write_bytes(damaged)
    assert inspect(tmp_path, None, True, True) == 1
    assert "sha256 differs" in json.loads(capsys.readouterr().out)["problems"][0]


def test_a_run_shows_its_last_metrics_and_only_complete_checkpoints(tmp_path):
    run = Run(tmp_path)
    run.update_status(kind="tokenizer", state="failed", error="no room", step=20, steps=30)
    rows = [{"step": 10, "split": "train", "loss": 2}, {"step": 20, "split": "train", "loss": 1.5}]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, marker in ((10, "COMPLETE"), (20, "state.json")):
        folder = run.checkpoints / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / marker).touch()
    (facts,) = describe(tmp_path)
    assert facts["checkpoints"] == "step_00000010"
    assert facts["error"] == "no room"
    assert "loss 1.5" in facts["last train"]


def test_a_checkpoint_shows_whether_it_is_complete(tmp_path):
    folder = tmp_path / "step_00000010"
    folder.mkdir()
    state = {"step": 10, "samples_consumed": 160, "world_size": 2, "zero_stage": 3, "export": {}}
    (folder / "state.json").write_text(json.dumps(state))
    (facts,) = describe(folder)
    assert not facts["complete"]
    assert (facts["samples_consumed"], facts["world_size"], facts["zero_stage"]) == (160, 2, 3)
    (folder / "COMPLETE").touch()
    assert describe(folder)[0]["complete"]


def test_an_export_shows_its_size_from_the_header_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: prior\nstep: 7\nmodel: {width: 4}\n")
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (facts,) = describe(tmp_path)
    assert (facts["what"], facts["parameters"], facts["tensors"], facts["types"]) == ("export of a prior", 10, 2, "F32")


def test_a_pipeline_run_shows_the_state_of_each_job(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("name: demo\njobs: {one: {}, two: {}}\n")
    Run(tmp_path / "one").update_status(kind="shard", state="done")
    (facts,) = describe(tmp_path)
    assert (facts["what"], facts["one"], facts["two"]) == ("run of pipeline demo", "done", "not started")


def test_what_is_none_of_ours_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="not a shard set"):
        describe(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        describe(tmp_path / "x")
    Run(tmp_path).update_status(kind="prior")
    with pytest.raises(UsageError, match="--verify needs a shard set"):
        inspect(tmp_path, None, True, False)
