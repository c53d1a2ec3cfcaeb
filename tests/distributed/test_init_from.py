"""A training that begins at the weights of another one, in two processes."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from data_pipeline.errors import UsageError, UserError
from stpredict.exports import load_tokenizer
from stpredict.run import Run
from stpredict.training.config import InitFromConfig
from stpredict.training.initial import chosen, open_source
from stpredict.training.restoring import CheckpointReader
from stpredict.weight_files import index_text, split
from tests.distributed.command import stpredict
from tests.distributed.test_engine import checkpoint_weights, trial
from tests.distributed.toy import ToyModel, run_ranks, stack
from tests.stpredict.tokenized import CLIP, make_shards, make_tokenizer

ENGINES = [("fp32", 0), ("bf16", 1), ("fp32", 3), ("bf16", 3)]
TENSORS = {name: tensor for name, tensor in ToyModel(0.0, rich=True).state_dict().items() if name != "steps"}


def write_export(folder: Path, config: str = "kind: toy\n") -> dict[str, torch.Tensor]:
    """An export in several files, as another tool could have made it; returns its weights."""
    folder.mkdir()
    weights = {name: torch.randn(tensor.shape) for name, tensor in TENSORS.items()}
    weights["steps"] = torch.tensor([7])
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    files = split(sizes, 600)
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, folder / file)
    assert len(files) > 1
    (folder / "model.safetensors.index.json").write_text(index_text(files, sizes))
    (folder / "config.yaml").write_text(config)
    return weights


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Trainings that have begun and done no step yet: their folder, and the weights of their sources."""
    out = tmp_path_factory.mktemp("begun")
    source = out / "source" / "checkpoints" / "step_00000003"
    exported = write_export(out / "exported")
    trials = [trial("source", rich=True, training={"steps": 3, "ema_decay": 0.9, "zero_stage": 2})]

    def begin(name: str, **changes) -> None:
        trials.append(trial(name, rich=True, resave=True, **changes))

    for precision, stage in ENGINES:
        settings = {"precision": precision, "zero_stage": stage, "ema_decay": 0.9}
        begin(f"averages_{precision}_{stage}", training=settings, init_from={"path": str(source)})
        begin(f"weights_{precision}_{stage}", training=settings, init_from={"path": str(source), "ema": False})
        begin(f"exported_{precision}_{stage}", training=settings, init_from={"path": str(out / "exported")})
        one_step = {**settings, "steps": 1}
        begun_there = {"path": str(out / "exported")}
        trials.append(trial(f"step_{precision}_{stage}", rich=True, training=one_step, init_from=begun_there))
        only = ["second.*", "mar?"]
        begin(f"part_{precision}_{stage}", training=settings, init_from={"path": str(source), "only": only})
    resumed = {"rich": True, "training": {"steps": 3, "zero_stage": 1}}
    trials.append(trial("resumed", until=1, init_from={"path": str(source)}, **resumed))
    trials.append(trial("resumed", init_from={"path": "/gone"}, **resumed))
    results = run_ranks(trials, out, 2)
    sources = {
        "averages": checkpoint_weights(source, ema=True),
        "weights": checkpoint_weights(source, ema=False),
        "exported": exported,
    }
    assert not torch.equal(sources["averages"]["first.weight"], sources["weights"]["first.weight"])
    return out, sources, results


def state_of(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "resaved" / "step_00000000")
    return {key.removeprefix("model/"): reader.tensor(key) for key in reader.index if key.startswith("model/")}


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
@pytest.mark.parametrize("kind", ["averages", "weights", "exported"])
def test_masters_buffers_and_averages_begin_at_the_sources_to_the_bit(begun, kind, precision, stage):
    out, sources, _ = begun
    state = state_of(out / f"{kind}_{precision}_{stage}")
    for name, expected in sources[kind].items():
        kinds = ["buffer"] if name in ("mark", "level", "steps") else ["weight"]
        if kinds == ["weight"] and not name.startswith("frozen"):
            kinds.append("ema")
            assert not state[f"exp_avg/{name}"].any()
            assert not state[f"exp_avg_sq/{name}"].any()
        if name.startswith("frozen"):
            expected = expected.to(torch.float32 if precision == "fp32" else torch.bfloat16)
        for key in kinds:
            assert torch.equal(state[f"{key}/{name}"], expected), (key, name)


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_the_first_step_computes_with_them(begun, precision, stage):
    out, sources, _ = begun
    model = ToyModel(0.0, rich=True)
    model.load_state_dict(sources["exported"])
    batch = stack(list(range(8)))
    error = (model(batch["x"]) - batch["y"]) * batch["mask"]
    loss = (error.square().sum() / batch["mask"].sum()).item()
    (row,) = (row for row in Run(out / f"step_{precision}_{stage}").metrics() if row["split"] == "train")
    assert row["l2"] == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 0.02)


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_of_a_part_the_rest_keeps_its_initialisation(begun, precision, stage):
    out, sources, _ = begun
    state = state_of(out / f"part_{precision}_{stage}")
    torch.manual_seed(0)
    initial = ToyModel(0.0, rich=True).state_dict()
    for name in ("second.weight", "second.bias"):
        assert torch.equal(state[f"weight/{name}"], sources["averages"][name])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16  # to which DeepSpeed rounds what it is given
    for name in ("first.weight", "first.bias"):
        assert torch.equal(state[f"weight/{name}"].to(dtype), initial[name].to(dtype))
    assert torch.equal(state["buffer/level"], initial["level"])


def test_a_resumed_run_does_not_begin_at_them_again(begun):
    *_, results = begun
    stopped, resumed = (result for result in results[-2:])
    assert (stopped["step"], resumed["step"]) == (1, 3)


HERE = {"encoder.a": (2, 3), "encoder.b": (3,), "decoder.a": (3, 2)}


def take(there, *only):
    config = InitFromConfig(path="x", only=only or None)
    return chosen(config, Path("runs/x"), HERE, there)


def test_without_patterns_all_must_fit_and_what_does_is_named():
    assert take(HERE) == set(HERE)
    there = {"encoder.a": (2, 3), "encoder.b": (3,), "decoder.a": (3, 4), "head": (1,)}
    with pytest.raises(UsageError) as error:
        take(there)
    assert str(error.value) == (
        "init_from runs/x: does not fit this model: it has besides head; shapes differ: decoder.a (3, 4) → (3, 2); "
        "a part of it does: init_from.path=x 'init_from.only=[encoder.*]'"
    )
    with pytest.raises(UsageError, match=r"it lacks encoder.b"):
        take({name: shape for name, shape in HERE.items() if name != "encoder.b"})
    with pytest.raises(UsageError, match=r"a part of it does: .*'init_from\.only=\[decoder\.\*, encoder\.a\]'$"):
        take({**HERE, "encoder.b": (4,), "encoder.c": (1,)})
    with pytest.raises(UsageError, match=r"nothing of it does$"):
        take({"encoder.b": (4,)})


def test_what_patterns_ask_for_must_be_in_both():
    there = {"encoder.a": (2, 3), "encoder.b": (3,), "head.a": (1,)}
    assert take(there, "encoder.*") == {"encoder.a", "encoder.b"}
    assert take(there, "*.b", "encoder.a") == {"encoder.a", "encoder.b"}
    with pytest.raises(
        UsageError, match=r"only 'tail.\*' matches no parameter; there are decoder.\*, encoder.\*, head.\*"
    ):
        take(there, "encoder.*", "tail.*")
    with pytest.raises(UsageError, match=r"it lacks decoder.a"):
        take(there, "decoder.*")
    with pytest.raises(UsageError, match=r"it has besides head.a"):
        take(there, "head.*")


def test_sources_that_are_none_are_named(tmp_path):
    def opened(path, **settings):
        return open_source(InitFromConfig(path=path, **settings), None)

    with pytest.raises(UsageError, match=f"init_from {tmp_path}: neither an export, nor a checkpoint, nor a run"):
        opened(tmp_path)
    unfinished = tmp_path / "run" / "checkpoints" / "step_00000003"
    unfinished.mkdir(parents=True)
    (unfinished / "COMPLETE").touch()
    with pytest.raises(UsageError, match=f"this run has no export yet; finish it, or give a checkpoint: {unfinished}"):
        opened(tmp_path / "run")
    write_export(tmp_path / "averages", "kind: toy\nema: true\n")
    assert opened(tmp_path / "averages", ema=True).shapes["mark"] == (3,)
    with pytest.raises(UsageError, match=r"holds averages of the weights, and init_from\.ema is false"):
        opened(tmp_path / "averages", ema=False)
    first = min((tmp_path / "averages").glob("*.safetensors"))
    first.write_bytes(b"\0" * 9)
    with pytest.raises(UserError, match=f"{first}: damaged, or missing"):
        opened(tmp_path / "averages")


def test_a_tokenizers_training_begins_at_an_export_on_the_command_line(tmp_path):
    source = make_tokenizer(tmp_path / "source")
    model = load_tokenizer(source)[1].model.model_dump(mode="json")
    job = {
        "kind": "tokenizer",
        "run": str(tmp_path / "run"),
        "data": {"shards": str(make_shards(tmp_path)), "clip": CLIP.model_dump(mode="json"), "workers": 0},
        "model": model,
        # A step too small to be seen, but where there is zero.
        "training": {"steps": 1, "batch_size": 2, "precision": "fp32", "optimizer": {"lr": 1e-30}},
        "init_from": str(source),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = stpredict("train", tmp_path / "job.yaml")
    assert done.returncode == 0, done.stderr
    expected = load_tokenizer(source)[0].state_dict()
    found = load_tokenizer(tmp_path / "run")[0].state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-29)
    elements = f"{sum(tensor.numel() for tensor in expected.values()):,}"
    assert f"init_from {source}: {elements} of {elements} parameters\n" in Run(tmp_path / "run").log_path(0).read_text()
    changed = stpredict("train", tmp_path / "job.yaml", f"run={tmp_path / 'other'}", "model.channels=[16, 24]")
    assert changed.returncode == 2
    assert f"init_from {source}: does not fit this model: " in changed.stderr
