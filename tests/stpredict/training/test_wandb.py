"""Weights & Biases, offline: what its files hold. Skips where it is not installed (pip install 'stpredict[wandb]')."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from stpredict.run import Run
from stpredict.training.config import WandbConfig
from stpredict.training.logger import MetricsLogger
from stpredict.training.wandb_sink import WandbSink, check_wandb

CONFIG = WandbConfig(project="videos", mode="offline", tags=("a",))


def records(path):
    """W&B's records in one of its files: 32 KiB blocks, as LevelDB's log has them, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or the last of it
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def values(items):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def test_a_training_that_continues_writes_to_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    run = Run(tmp_path / "tokenizer")
    run.path.mkdir()
    for start in (0, 2):
        logger = MetricsLogger(run, start, WandbSink(run, CONFIG, {"training.optimizer.lr": 0.5}))
        logger.scalars("train", start + 1, {"loss": 1 / (start + 1)})
        logger.scalars("val", start + 2, {"psnr": 20.0 + start})
        logger.picture("val/picture", start + 2, np.zeros((4, 8, 8, 3), np.uint8))
        logger.close()
    rows, ids = [], set()
    for file in sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("videos", "tokenizer")
                settings = {
                    item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.run.config.update
                }
                assert settings["training.optimizer.lr"] == 0.5
            if record.HasField("history"):
                row = values(record.history.item)
                rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    assert ids == {(run.path / "wandb" / "id").read_text()}
    pictures = [row for row in rows if "val/picture" in row]
    assert [row for row in rows if row not in pictures] == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "val/psnr": 20.0},
        {"step": 3, "train/loss": pytest.approx(1 / 3)},
        {"step": 4, "val/psnr": 22.0},
    ]
    assert [row["step"] for row in pictures] == [2, 4]


def test_without_a_login_it_says_how_to_get_one(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="not logged in; run `wandb login`"):
        check_wandb(CONFIG.model_copy(update={"mode": "online"}))
    check_wandb(CONFIG)


def test_where_it_is_not_installed_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'stpredict\[wandb\]'"):
        check_wandb(CONFIG)


def test_where_a_part_of_it_is_missing_it_names_that(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("import a_part_of_it")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UsageError, match=r"cannot be imported \(No module named 'a_part_of_it'\)"):
        check_wandb(CONFIG)
