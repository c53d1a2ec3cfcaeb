"""``init_from`` in configs and pipelines: what it decides, and that runs without it are as before there was the key."""

import pytest
import yaml

from data_pipeline.errors import UsageError
from launcher.pipeline import load_pipeline
from launcher.rundir import fingerprint
from stpredict.config import as_yaml, flat, validate
from stpredict.jobs.config import AnyJobConfig

DATA = {"kind": "tokenizer", "run": "x", "data": {"shards": "s"}, "training": {"steps": 10, "batch_size": 4}}


def config(**changes):
    return validate(AnyJobConfig, {**DATA, **changes}, "job.yaml")


def test_a_path_is_short_for_a_mapping_and_only_takes_patterns():
    assert config(init_from="runs/a") == config(init_from={"path": "runs/a"})
    assert config(init_from={"path": "runs/a", "only": ["encoder.*"]}).init_from.only == ("encoder.*",)
    with pytest.raises(UsageError, match=r"unknown key 'init_from.patterns'"):
        config(init_from={"path": "runs/a", "patterns": ["encoder.*"]})
    with pytest.raises(UsageError, match=r"key 'init_from.only' is empty"):
        config(init_from={"path": "runs/a", "only": []})


def test_it_decides_the_weights_and_a_config_without_it_is_as_before():
    with_it = config(init_from={"path": "runs/a", "only": ["encoder.*"]})
    decisive = with_it.decisive(flat(with_it.model_dump(mode="json")))
    assert (decisive["init_from.path"], decisive["init_from.only"]) == ("runs/a", ["encoder.*"])
    assert validate(AnyJobConfig, yaml.safe_load(as_yaml(with_it)), "config.yaml") == with_it
    assert "init_from" not in as_yaml(config())
    others = (config(), config(init_from="runs/a"), config(init_from="runs/b"), with_it)
    assert len({fingerprint(other) for other in others}) == 4


def test_in_a_pipeline_it_follows_the_run_that_it_needs(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(DATA))

    def jobs(**changes):
        first = {"config": "job.yaml", "set": {"training": {"steps": 5, **changes}}}
        second = {"config": "job.yaml", "needs": ["first"], "set": {"init_from": "${run:first}"}}
        pipeline = {"kind": "pipeline", "name": "p", "run": str(tmp_path), "jobs": {"first": first, "second": second}}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
        return load_pipeline(tmp_path / "p.yaml")[1]

    one, other = jobs(), jobs(batch_size=8)
    assert one[1].config.init_from.path == tmp_path / "first"
    assert one[1].config == other[1].config
    assert one[1].fingerprint != other[1].fingerprint
