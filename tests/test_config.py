"""Loading configs: what is merged, and what is said when something is wrong."""

import sys

import pytest

from data_pipeline.errors import UsageError
from stpredict.config import as_yaml, load
from stpredict.jobs.config import AnyJobConfig
from tests.processes import bounded

BASE = "kind: tokenizer\nrun: runs/x\ndata: {shards: a, clip: {frames: 9}}\ntraining: {steps: 10, batch_size: 4}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="job.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_a_file_changes_its_base_and_overrides_change_both(write):
    write(BASE, "base/base.yaml")
    path = write("base: base/base.yaml\ndata: {shards: b}\ntraining: {steps: 20}\n")
    config = load(AnyJobConfig, path, ["training.steps=30", "data.clip.size=[32,48]"])
    assert (config.training.steps, config.training.batch_size) == (30, 4)
    assert (str(config.data.shards), config.data.clip.frames, config.data.clip.size) == ("b", 9, (32, 48))


def test_later_bases_win_and_bases_have_bases(write):
    write(BASE, "a.yaml")
    write("base: a.yaml\nseed: 1\ntraining: {steps: 11}\n", "b.yaml")
    write("training: {steps: 12}\n", "c.yaml")
    config = load(AnyJobConfig, write("base: [b.yaml, c.yaml]\n"))
    assert (config.seed, config.training.steps) == (1, 12)


def test_values_may_refer_to_each_other(write):
    config = load(AnyJobConfig, write(BASE + "seed: ${training.steps}\n"), ["training.steps=7"])
    assert config.seed == 7


def test_what_is_written_loads_again_to_the_same(write):
    config = load(AnyJobConfig, write(BASE))
    assert load(AnyJobConfig, write(as_yaml(config), "again.yaml")) == config


def test_run_of_another_job_is_resolved_by_whoever_knows_the_jobs(write, tmp_path):
    path = write(BASE.replace("shards: a", "shards: '${run:shard}/x'"))
    assert load(AnyJobConfig, path, run_of=lambda name: tmp_path / name).data.shards == str(tmp_path / "shard" / "x")
    with pytest.raises(UsageError, match=r"\$\{run:shard\} has a meaning only inside a pipeline"):
        load(AnyJobConfig, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("traning: {}", r"unknown key 'traning'; did you mean 'training'\?"),
        ("data: {clip: {frame: 3}}", r"unknown key 'data.clip.frame'; did you mean 'frames'\?"),
        ("training: {optimizer: {kind: lion}}", r"key 'training.optimizer.kind' is lion; give .*'adamw' or 'sgd'"),
        ("training: {steps: many}", r"key 'training.steps' is many; give a whole number"),
        ("training: {steps: 0}", r"key 'training.steps' is 0; give 1 or more"),
        ("seed: ${sead}", r"key 'seed': .*'sead' not found"),
        ("seed: ???", r"key 'seed': has no value"),
        ("kind: tokeniser", r"key 'kind' is 'tokeniser'; known kinds: shard, tokenizer"),
        ("base: nowhere.yaml", r"nowhere.yaml: no such config file"),
        ("base: job.yaml", r"job.yaml: `base` leads back to the file itself"),
        ("seed: [", r"job.yaml: not valid YAML"),
        ("data: {shards: ???, workers: 2}", r"""not valid YAML: .*; within {} and \[\] write "\?\?\?" with quotes"""),
        ("- a", r"job.yaml: "),
    ],
)
def test_a_mistake_is_named_with_file_and_key(write, change, message):
    write(BASE, "base.yaml")
    text = change if change.startswith(("base", "-")) else f"base: base.yaml\n{change}\n"
    with pytest.raises(UsageError, match=message) as raised:
        load(AnyJobConfig, write(text))
    assert "\n" not in str(raised.value)
    assert "job.yaml" in str(raised.value) or "nowhere.yaml" in str(raised.value)


def test_a_missing_key_and_a_missing_kind_are_named(write):
    with pytest.raises(UsageError, match=r"key 'training.batch_size' is missing"):
        load(AnyJobConfig, write("kind: tokenizer\nrun: x\ndata: {shards: a}\ntraining: {steps: 1}\n"))
    with pytest.raises(UsageError, match=r"key 'kind' is missing; known kinds: shard"):
        load(AnyJobConfig, write("run: x\n"))


@pytest.mark.parametrize("override", ["training.steps", "=3", "a=[1"])
def test_a_malformed_override_is_named(write, override):
    with pytest.raises(UsageError, match=r"override"):
        load(AnyJobConfig, write(BASE), [override])


def test_a_value_under_a_wrong_key_of_an_override_is_named(write):
    with pytest.raises(UsageError, match=r"unknown key 'training.step'; did you mean 'steps'\?"):
        load(AnyJobConfig, write(BASE), ["training.step=3"])


@pytest.mark.parametrize(
    "code",
    [
        "import launcher, stpredict.jobs.config, stpredict.run, data_pipeline.config",
        "import launcher.cli; sys.argv[1:] = ['--help']; launcher.cli.main()",
        "import launcher.cli; sys.argv[1:] = ['status', {run!r}]; launcher.cli.main()",
        "import launcher.cli; sys.argv[1:] = ['logs', {run!r}]; launcher.cli.main()",
        "import launcher.cli; sys.argv[1:] = ['cancel', {run!r}]; launcher.cli.main()",
        "import launcher.cli; sys.argv[1:] = ['resume', {run!r}]; launcher.cli.main()",
        "import launcher.cli; sys.argv[1:] = ['train', 'nope.yaml']; launcher.cli.main()",
    ],
)
def test_configs_help_and_status_import_no_torch(code, tmp_path):
    (tmp_path / "status.json").write_text('{"kind": "shard", "state": "done"}')
    check = "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'FREE'))"
    script = f"import sys, atexit; {check}; {code.format(run=str(tmp_path))}"
    result = bounded([sys.executable, "-c", script])
    assert result.stdout.splitlines()[-1] == "FREE", result.stderr


def test_a_value_where_keys_belong_is_answered_with_the_keys(write):
    with pytest.raises(UsageError, match=r"key 'training.offload' holds keys, not a value: optimizer, parameters$"):
        load(AnyJobConfig, write(BASE), ["training.offload=cpu"])


def test_betas_lie_between_0_and_1(write):
    with pytest.raises(UsageError, match=r"key 'training.optimizer.betas.1' is .*; give less than 1"):
        load(AnyJobConfig, write(BASE), ["training.optimizer.betas=[0.9,1.5]"])
