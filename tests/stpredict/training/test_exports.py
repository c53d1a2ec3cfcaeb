"""Replacing an export loses nothing, whatever happens in between."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from stpredict import exports
from stpredict.exports import TokenizerExport, export_checkpoint, fingerprint, load_tokenizer
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig

MODEL = CausalCnnConfig(channels=(4, 4), blocks=(0, 0), strides=((2, 2, 2),), middle_blocks=0, groups=2, levels=(4, 4))


@pytest.fixture
def export(tmp_path, monkeypatch):
    """``export(seed)`` exports a tokenizer with weights of that seed to the same folder, as from a checkpoint."""
    config = TokenizerExport(clip={"frames": 5}, model=MODEL).model_dump(mode="json")
    monkeypatch.setattr(exports, "read_state", lambda _: type("State", (), {"export": config}))

    def make(seed: int) -> Path:
        torch.manual_seed(seed)
        weights = CausalCnnTokenizer(MODEL).state_dict()
        monkeypatch.setattr(exports, "checkpoint_weights", lambda _: weights.items())
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "export")
        return tmp_path / "export"

    return make


def test_a_new_export_replaces_the_old_one_and_leaves_nothing_beside_it(export):
    first = fingerprint(export(1))
    assert fingerprint(export(2)) != first
    assert fingerprint(folder := export(1)) == first
    assert load_tokenizer(folder)[1].model == MODEL
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_swap_that_breaks_off_in_the_middle_leaves_the_old_export(export, monkeypatch):
    first = fingerprint(folder := export(1))
    rename = Path.rename

    def fail_once_the_old_one_is_aside(self, target):
        if target == folder:
            monkeypatch.setattr(Path, "rename", rename)
            raise OSError("the file server is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once_the_old_one_is_aside)
    with pytest.raises(UserError, match="cannot write the export: the file server is gone"):
        export(2)
    assert fingerprint(folder) == first
    assert [path.name for path in folder.parent.iterdir()] == ["export"]
