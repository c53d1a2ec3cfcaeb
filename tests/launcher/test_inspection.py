import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, Moments, Shard, file_sha256, write_manifest
from launcher.inspection import describe, inspect
from stpredict.config import as_yaml, flat
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.run import Run
from stpredict.training.config import TrainingConfig
from stpredict.weight_files import index_text
from tests.stpredict.training.made_checkpoint import flip_a_bit, make_checkpoint

TENSORS = {
    **{f"model/{kind}/a": torch.ones(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")},
    "model/weight/frozen": torch.ones(5),
    "model/buffer/mean": torch.ones(1),
    **{f"discriminator/{kind}/a": torch.ones(4) for kind in ("weight", "exp_avg", "exp_avg_sq")},
}
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


def test_a_run_shows_its_last_metrics_and_its_checkpoints(tmp_path, capsys):
    run = Run(tmp_path)
    run.update_status(kind="tokenizer", state="failed", error="no room", step=20, steps=30)
    rows = [{"step": 10, "split": "train", "loss": 2}, {"step": 20, "split": "train", "loss": 1.5}]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_checkpoint(run.checkpoints, TENSORS, 10)
    (run.checkpoints / "step_00000020").mkdir()
    (facts,) = describe(str(tmp_path))
    complete, saving = facts["checkpoints"]
    assert (complete["name"], complete["complete"]) == ("step_00000010", True)
    assert complete["bytes"] == sum(file.stat().st_size for file in (run.checkpoints / "step_00000010").iterdir())
    problem = "has no COMPLETE marker (its save was interrupted)"
    assert saving == {"name": "step_00000020", "complete": False, "bytes": 0, "problem": problem}
    assert facts["error"] == "no room"
    assert "loss 1.5" in facts["last train"]
    assert inspect(str(tmp_path), None, False, None, False) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"step_00000010 {complete['bytes']:,} bytes step_00000020 0 bytes; has no COMPLETE marker" in printed


def test_a_checkpoint_shows_what_was_saved_of_what(tmp_path, capsys):
    state = {
        "samples_consumed": {"main": 160, "other": 40},
        "quarantined": {"a": "died"},
        "optimizer_steps": {"model": 10, "discriminator": 9, "model/late": 3},
        "metrics": {"psnr": 21.5},
    }
    folder = make_checkpoint(tmp_path, TENSORS, 10, **state)
    (facts,) = describe(str(folder))
    assert facts["complete"]
    assert "problem" not in facts
    expected = {"step": 10, "world_size": 2, "zero_stage": 3, "precision": "bf16", "files": 7, "quarantined": 1}
    assert {key: facts[key] for key in expected} == expected
    assert facts["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert facts["model"] == {"trained": 6, "frozen": 5, "in buffers": 1}
    assert facts["discriminator"] == {"trained": 4, "frozen": 0, "in buffers": 0}
    assert facts["ema"]
    assert facts["samples_consumed"] == state["samples_consumed"]
    assert facts["optimizer_steps"] == {"model": 10, "discriminator": 9}
    assert facts["metrics"] == {"psnr": 21.5}
    assert inspect(str(folder), None, False, None, False) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "complete yes" in printed
    assert "samples consumed main: 160 other: 40" in printed
    assert "model trained: 6 frozen: 5 in buffers: 1" in printed


def test_a_checkpoint_without_averages_says_so(tmp_path):
    tensors = {key: tensor for key, tensor in TENSORS.items() if "/ema/" not in key}
    assert describe(str(make_checkpoint(tmp_path, tensors)))[0]["ema"] is False


def test_a_checkpoint_says_what_its_run_has_changed_since(tmp_path):
    run = Run(tmp_path / "run")
    training = TrainingConfig(steps=30, batch_size=4)
    config = TokenizerJobConfig(run=run.path, data={"shards": "x"}, training=training)
    identity = config.decisive(flat(config.model_dump(mode="json"))) | {"training.precision": "bf16"}
    folder = make_checkpoint(run.checkpoints, TENSORS, 10, config=identity)
    run.write_config(as_yaml(config))
    (facts,) = describe(str(folder))
    assert "changed since" not in facts
    run.write_config(as_yaml(config.model_copy(update={"training": training.model_copy(update={"steps": 40})})))
    (changed,) = describe(str(folder))
    assert changed.pop("changed since") == ["training.steps: 30 → 40"]
    assert changed == facts


def test_verify_reads_a_checkpoint_and_names_what_is_damaged(tmp_path, capsys):
    run = Run(tmp_path)
    run.update_status(kind="tokenizer", state="running")
    folders = [make_checkpoint(run.checkpoints, TENSORS, step) for step in (10, 20)]
    (run.checkpoints / "step_00000030").mkdir()
    for place in (run.path, *folders):
        assert inspect(str(place), None, True, None, False) == 0
        assert capsys.readouterr().out.endswith("all checkpoints are as they were written\n")
    flip_a_bit(folders[1] / "rank_00000.safetensors")
    assert describe(str(folders[1]))[0]["complete"]  # nothing to be seen without reading it
    problem = f"{folders[1]}: is damaged (rank_00000.safetensors differs from what was written)"
    for place in (run.path, folders[1]):
        assert inspect(str(place), None, True, None, False) == 1
        assert problem in capsys.readouterr().err
    assert inspect(str(folders[1]), None, True, None, True) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        {"checkpoint": str(folders[1]), "reason": problem.partition(": ")[2]}
    ]
    truncate(folders[0])
    assert inspect(str(run.path), None, True, None, False) == 1
    assert f"{folders[0]}: is damaged (rank_00001.safetensors has 3 bytes of " in capsys.readouterr().err


def truncate(folder):
    (folder / "rank_00001.safetensors").write_bytes(b"abc")


def former(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "mp_rank_00_model_states.pt").touch()
    (folder / "COMPLETE").touch()
    (folder / "state.json").write_text(json.dumps({"step": 10, "samples_consumed": 160, "export": {}}))


WRECKS = {
    "unmarked": (lambda f: (f / "COMPLETE").unlink(), "has no COMPLETE marker"),
    "empty": (lambda f: [file.unlink() for file in f.iterdir()], "has no COMPLETE marker"),
    "half a marker": (lambda f: (f / "COMPLETE").write_text('{"a"'), "has a marker, COMPLETE, that is damaged"),
    "truncated": (truncate, "rank_00001.safetensors has 3 bytes of "),
    "a file gone": (lambda f: (f / "random_00000.pt").unlink(), "random_00000.pt is missing"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json is missing"),
    "a state of others": (lambda f: (f / "state.json").write_text("[1]"), "state.json has 3 bytes of "),
    "former": (former, "is of an earlier version, DeepSpeed's own files"),
}


@pytest.mark.parametrize("wreck", WRECKS)
def test_a_checkpoint_that_is_not_whole_says_why(tmp_path, wreck, capsys):
    destroy, problem = WRECKS[wreck]
    folder = make_checkpoint(tmp_path, TENSORS)
    destroy(folder)
    (facts,) = describe(str(folder))
    assert not facts["complete"]
    assert problem in facts["problem"]
    assert inspect(str(folder), None, True, None, False) == 1
    output = capsys.readouterr()
    assert problem in output.err
    assert "complete no" in " ".join(output.out.split())


def test_an_export_shows_its_size_from_the_header_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: prior\nstep: 7\nmodel: {width: 4}\n")
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (facts,) = describe(str(tmp_path))
    assert (facts["what"], facts["parameters"], facts["tensors"], facts["types"]) == ("export of a prior", 10, 2, "F32")
    assert (facts["files"], facts["bytes"]) == (1, (tmp_path / "model.safetensors").stat().st_size)
    (tmp_path / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(index_text(files, {"a": 24, "b": 16}))
    (split,) = describe(str(tmp_path))
    assert {key: split[key] for key in ("parameters", "tensors", "files")} == {
        "parameters": 10,
        "tensors": 2,
        "files": 2,
    }
    assert split["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_checkpoints_and_exports_are_described_without_torch(tmp_path):
    folder = make_checkpoint(tmp_path, TENSORS)
    (tmp_path / "config.yaml").write_text("kind: prior\n")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from launcher.inspection import describe; "
        "[describe(path) for path in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder, tmp_path], timeout=60, check=False).returncode == 0


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
    with pytest.raises(UsageError, match="--verify needs a shard set or a checkpoint"):
        inspect(str(tmp_path), None, True, None, False)
