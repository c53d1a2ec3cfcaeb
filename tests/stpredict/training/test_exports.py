"""Exports of checkpoints: what is in them, in how many files and how much memory; replacing one loses nothing."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import UsageError, UserError
from stpredict.config import as_yaml
from stpredict.exports import TokenizerExport, export_checkpoint, fingerprint, load_tokenizer
from stpredict.jobs.export import export_run
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.config import InitFromConfig
from stpredict.training.initial import open_source
from stpredict.training.restoring import newest_sound_checkpoint
from stpredict.weight_files import WeightFiles
from tests.stpredict.training.made_checkpoint import flip_a_bit, make_checkpoint

MODEL = CausalCnnConfig(channels=(4, 4), blocks=(0, 0), strides=((2, 2, 2),), middle_blocks=0, groups=2, levels=(4, 4))
CONFIG = TokenizerExport(clip={"frames": 5}, model=MODEL).model_dump(mode="json", exclude={"ema"})


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return CausalCnnTokenizer(MODEL).state_dict()


def make(checkpoints: Path, seed: int, step: int = 10, ema: int | None = None, **state) -> Path:
    """A checkpoint of a tokenizer with weights of ``seed`` and averages of seed ``ema``."""
    parameters = {name for name, _ in CausalCnnTokenizer(MODEL).named_parameters()}
    tensors = {}
    for name, tensor in weights_of(seed).items():
        tensors[f"model/{'weight' if name in parameters else 'buffer'}/{name}"] = tensor
    if ema is not None:
        tensors |= {f"model/ema/{name}": tensor for name, tensor in weights_of(ema).items() if name in parameters}
    return make_checkpoint(checkpoints, tensors, step, export={**CONFIG, "step": step}, **state)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def export(path: Path, out: Path, step=None, best=False, ema=None) -> None:
    export_run(path, out, lambda _: nullcontext(lambda done, total: None), step, best, ema)


def test_a_new_export_replaces_the_old_one_whatever_its_files_and_leaves_nothing_beside_it(tmp_path):
    one, two = (make(tmp_path / str(seed), seed) for seed in (1, 2))
    out = tmp_path / "out" / "export"
    export_checkpoint(one, out)
    first = fingerprint(out)
    export_checkpoint(two, out, max_file_bytes=1000)
    assert fingerprint(out) != first
    assert len(list(out.iterdir())) > 3
    export_checkpoint(one, out)
    assert fingerprint(out) == first
    assert load_tokenizer(out)[1].model == MODEL
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_a_swap_that_breaks_off_in_the_middle_leaves_the_old_export(tmp_path, monkeypatch):
    one, two = (make(tmp_path / str(seed), seed) for seed in (1, 2))
    folder = tmp_path / "out" / "export"
    export_checkpoint(one, folder)
    first = fingerprint(folder)
    rename = Path.rename

    def fail_once_the_old_one_is_aside(self, target):
        if target == folder:
            monkeypatch.setattr(Path, "rename", rename)
            raise OSError("the file server is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once_the_old_one_is_aside)
    with pytest.raises(UserError, match="cannot write the export: the file server is gone"):
        export_checkpoint(two, folder)
    assert fingerprint(folder) == first
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_what_killed_exports_left_goes_but_never_before_there_is_a_whole_one(tmp_path, monkeypatch):
    one = make(tmp_path / "1", 1)
    out = tmp_path / "out" / "export"
    left = [out.parent / f".export.{letter * 32}.tmp" for letter in "ab"]
    export_checkpoint(one, left[0])  # killed in the middle of the swap: this was the only export
    left[1].mkdir()
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(UserError, match="the export needs"):
            export_checkpoint(one, out)
    assert all(folder.is_dir() for folder in left)
    export_checkpoint(one, out)
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_a_weight_under_two_names_is_exported_and_loaded_once(tmp_path, monkeypatch):
    class Tied(CausalCnnTokenizer):
        def __init__(self, config):
            super().__init__(config)
            self.twin = self.encoder

    monkeypatch.setattr("stpredict.exports.CausalCnnTokenizer", Tied)
    export_checkpoint(make(tmp_path / "checkpoints", 3), tmp_path / "export")
    model, _, _ = load_tokenizer(tmp_path / "export")
    assert same({name: tensor for name, tensor in model.state_dict().items() if "twin" not in name}, weights_of(3))
    assert model.twin is model.encoder


def test_several_files_are_hugging_faces_layout_and_load_as_one_does(tmp_path):
    checkpoint = make(tmp_path / "checkpoints", 3)
    expected = weights_of(3)
    export_checkpoint(checkpoint, tmp_path / "one")
    assert same(load_file(tmp_path / "one" / "model.safetensors"), expected)
    largest = max(tensor.nbytes for tensor in expected.values())
    seen = []
    export_checkpoint(checkpoint, tmp_path / "many", None, largest, lambda done, total: seen.append((done, total)))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"] == {"total_size": total}
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    files = sorted(path.name for path in (tmp_path / "many").glob("model-*"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    found = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= largest
        assert {index["weight_map"][name] for name in tensors} == {file}
        found |= tensors
    assert same(found, expected)
    assert index["weight_map"].keys() == found.keys()
    for folder in ("one", "many"):
        model, config, _ = load_tokenizer(tmp_path / folder)
        assert same(model.state_dict(), expected)
        assert config.step == 10
    flip_a_bit(tmp_path / "many" / files[-1])
    assert fingerprint(tmp_path / "many") != load_tokenizer(tmp_path / "one")[2]


def test_averages_are_exported_where_there_are_any_and_the_config_says_so(tmp_path):
    checkpoint = make(tmp_path / "checkpoints", 4, ema=5)
    for name, ema, expected in (("default", None, 5), ("ema", True, 5), ("weights", False, 4)):
        export_checkpoint(checkpoint, tmp_path / name, ema)
        model, config, _ = load_tokenizer(tmp_path / name)
        assert same(model.state_dict(), weights_of(expected))
        assert config.ema == (expected == 5)
    without = make(tmp_path / "without", 4)
    export_checkpoint(without, tmp_path / "default")
    assert not load_tokenizer(tmp_path / "default")[1].ema
    with pytest.raises(UsageError, match=r"step_00000010: was trained without training\.ema_decay"):
        export_checkpoint(without, tmp_path / "ema", True)
    # The same weights are the same model, whatever they were in their training.
    assert fingerprint(tmp_path / "weights") == fingerprint(tmp_path / "default")


def test_half_precision_is_exported_in_fp32_and_integers_as_they_are(tmp_path):
    tensors = {
        "model/weight/a": torch.randn(3, 5, dtype=torch.bfloat16),
        "model/buffer/count": torch.tensor(2**40),
        "model/buffer/seen": torch.tensor([True, False]),
        "model/exp_avg/a": torch.zeros(3, 5),
        "discriminator/weight/a": torch.zeros(2),
    }
    export_checkpoint(make_checkpoint(tmp_path / "checkpoints", tensors, export=CONFIG), tmp_path / "out", None, 30)
    files = WeightFiles(tmp_path / "out")
    assert files.types == {"a": "F32", "count": "I64", "seen": "BOOL"}
    assert files.shapes == {"a": (3, 5), "count": (), "seen": (2,)}
    exported = {name: tensor for path in files.paths for name, tensor in load_file(path).items()}
    assert torch.equal(exported["a"], tensors["model/weight/a"].float())
    assert exported["count"] == 2**40


def test_the_fingerprint_of_an_export_that_is_older_than_these_keys_is_unchanged(tmp_path):
    tmp_path.joinpath("config.yaml").write_text(
        "kind: tokenizer\nformat: 1\nstep: 7\nclip: {frames: 5}\nmodel: {channels: [4, 4], blocks: [0, 0], "
        "strides: [[2, 2, 2]], middle_blocks: 0, groups: 2, levels: [4, 4]}\n"
    )
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    # Written by the version before averages and several files.
    assert fingerprint(tmp_path) == "22f4bf81ea5752fe3eb95186f52f5b603b45af1928748fd271e0b7b79fa82e24"


def test_other_things_are_not_overwritten_and_room_is_asked_for_first(tmp_path, monkeypatch):
    checkpoint = make(tmp_path / "checkpoints", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds other things than an export"):
        export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(UserError, match=r"new: the export needs 0 MB, 0 MB are free; make room"):
        export_checkpoint(checkpoint, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]


def test_where_to_is_asked_before_a_checkpoint_is_read(tmp_path):
    flip_a_bit(make(tmp_path / "checkpoints", 1) / "rank_00001.safetensors")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds other things than an export"):
        export(tmp_path, tmp_path)


def test_whoever_may_read_a_file_of_ones_own_may_read_all_of_an_export(tmp_path):
    out = tmp_path / "out"
    export_checkpoint(make(tmp_path / "checkpoints", 1), out, max_file_bytes=1000)
    (tmp_path / "own").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "own", *out.iterdir())}
    assert len(modes) == 1


def test_a_damaged_checkpoint_is_refused_by_name_and_by_default_the_one_before_is_taken(tmp_path, caplog):
    run, out = Run(tmp_path / "run"), tmp_path / "out"
    older, newer = (make(run.checkpoints, step, step) for step in (10, 20))
    (run.checkpoints / "step_00000030").mkdir()
    flip_a_bit(newer / "rank_00001.safetensors")
    problem = r"step_00000020 is damaged \(rank_00001.safetensors differs from what was written\)"
    for path, step in ((run.path, 20), (newer, None)):
        with pytest.raises(UserError, match=problem):
            export(path, out, step)
    with pytest.raises(UserError, match=r"step_00000030 has no COMPLETE marker"):
        export(run.path, out, 30)
    assert not out.exists()
    export(run.path, out)
    assert load_tokenizer(out)[1].step == 10
    skipped = [record.getMessage() for record in caplog.records]
    assert [text.split("/")[-1].split()[0] for text in skipped] == ["step_00000030", "step_00000020"]
    assert all(text.endswith(": skipped") for text in skipped)
    (older / "index.json").unlink()
    with pytest.raises(
        UserError, match=r"step_00000030 has no COMPLETE .*0020 is damaged .*0010 is damaged \(index.json"
    ):
        export(run.path, out)


def test_a_checkpoint_is_chosen_by_path_by_step_or_as_the_best(tmp_path):
    run, out = Run(tmp_path / "run"), tmp_path / "out"
    for step, psnr in ((10, 21.0), (20, 25.0), (30, 24.0)):
        make(run.checkpoints, step, step, metrics={"psnr": psnr})
    for path, choice, expected in (
        (run.path, {}, 30),
        (run.path, {"step": 10}, 10),
        (run.checkpoints / "step_00000020", {}, 20),
    ):
        export(path, out, **choice)
        assert load_tokenizer(out)[1].step == expected
        assert same(load_tokenizer(out)[0].state_dict(), weights_of(expected))
    with pytest.raises(UsageError, match=r"--best needs a run that was trained with training\.checkpoint\.best"):
        export(run.path, out, best=True)
    for mode, expected in (("max", 20), ("min", 10)):
        run.write_config(f"training: {{checkpoint: {{best: {{metric: psnr, mode: {mode}}}}}}}\n")
        export(run.path, out, best=True)
        assert load_tokenizer(out)[1].step == expected
    for step, psnr in ((40, 25.0), (50, float("nan")), (60, 99.0)):
        make(run.checkpoints, step, step, metrics={"psnr": psnr})
    (run.checkpoints / "step_00000060" / "state.json").write_text("{")
    run.write_config("training: {checkpoint: {best: {metric: psnr}}}\n")
    export(run.path, out, best=True)
    assert load_tokenizer(out)[1].step == 40
    run.write_config("training: {checkpoint: {best: {metric: fvd}}}\n")
    with pytest.raises(UsageError, match="no complete checkpoint here was saved with a validation's fvd"):
        export(run.path, out, best=True)
    with pytest.raises(UsageError, match="no complete checkpoint of step 15; there are 10, 20, 30, 40, 50, 60"):
        export(run.path, out, step=15)
    with pytest.raises(UsageError, match="not both"):
        export(run.path, out, step=10, best=True)
    with pytest.raises(UsageError, match="is a checkpoint; --step and --best go with a run"):
        export(run.checkpoints / "step_00000020", out, step=20)
    for choice in ({}, {"step": 10}):
        with pytest.raises(UsageError, match="no run with a complete checkpoint here"):
            export(tmp_path, out, **choice)


class Alone:
    """The ranks of a job of one process."""

    rank, size, is_main = 0, 1, True

    def from_main(self, value):
        return value

    def gather(self, value):
        return [value]


def test_a_checkpoint_of_the_first_version_is_one_clear_line_wherever_it_is_read(tmp_path):
    run = Run(tmp_path / "run")
    folder = run.checkpoints / "step_00000010"
    folder.mkdir(parents=True)
    for name in ("COMPLETE", "mp_rank_00_model_states.pt", "state.json"):
        (folder / name).write_text("{}")
    line = r"step_00000010:? is of an earlier version, DeepSpeed's own files, which cannot be read any more"
    for path in (folder, run.path):
        with pytest.raises(UserError, match=line):
            export(path, tmp_path / "out")
    with pytest.raises(UsageError, match=f"{line}; use another `run`"):
        newest_sound_checkpoint(run.checkpoints, Alone())
    with pytest.raises(UsageError, match=f"init_from .*{line}; give another"):
        open_source(InitFromConfig(path=folder), Alone())


def test_a_training_does_not_begin_at_a_damaged_checkpoint(tmp_path):
    folder = make(tmp_path, 1)
    assert open_source(InitFromConfig(path=folder), Alone()).shapes.keys() == weights_of(1).keys()
    flip_a_bit(folder / "rank_00000.safetensors")
    with pytest.raises(UsageError, match=r"step_00000010: is damaged \(rank_00000\.safetensors differs"):
        open_source(InitFromConfig(path=folder), Alone())


def test_weights_that_do_not_fit_their_config_or_are_damaged_are_named(tmp_path):
    out = tmp_path / "out"
    export_checkpoint(make(tmp_path / "checkpoints", 1), out, max_file_bytes=1000)
    other = MODEL.model_copy(update={"levels": (4, 4, 4)})
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(as_yaml(TokenizerExport(clip={"frames": 5}, model=other)))
    with pytest.raises(
        UserError, match=r"out: the weights do not fit config\.yaml: \S+ is missing or of another shape"
    ):
        load_tokenizer(out)
    (out / "config.yaml").write_text(text)
    file = min(out.glob("model-*"))
    name = min(load_file(file))
    save_file({other: tensor for other, tensor in load_file(file).items() if other != name}, file)
    with pytest.raises(UserError, match=f"index.json: {name} is listed and in none of the files"):
        load_tokenizer(out)
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: damaged, or missing"):
        load_tokenizer(out)


EXPORT = """
import sys
from pathlib import Path
from stpredict.exports import export_checkpoint
def peak():  # of this program; ru_maxrss would begin at what the process that started it has
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), max_file_bytes=int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory where Linux keeps it")
def test_an_export_takes_the_memory_of_less_than_three_of_its_files(tmp_path):
    limit, tensor = 64 * 2**20, torch.randn(4 * 2**20)  # 16 MiB
    tensors = {f"model/weight/{n:02d}": tensor + n for n in range(32)}
    tensors |= {f"model/exp_avg/{n:02d}": torch.zeros(1) for n in range(32)}
    checkpoint = make_checkpoint(tmp_path / "checkpoints", tensors, export=CONFIG)
    del tensors
    out = tmp_path / "out"
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * limit
    assert len(list(out.glob("model-*"))) == 8
    weights = WeightFiles(out)
    for n in (0, 31):
        found = torch.empty(tensor.numel())
        weights.fill(f"{n:02d}", 0, found)
        assert torch.equal(found, tensor + n)
