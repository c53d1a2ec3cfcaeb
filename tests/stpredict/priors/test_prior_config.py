"""``data`` of a prior: cached latents unless ``kind`` says otherwise, and errors that name the key; sizes of heads."""

import pytest

from data_pipeline.errors import UsageError
from stpredict.config import as_yaml, load
from stpredict.jobs.config import AnyJobConfig
from stpredict.priors.config import CachedLatentsConfig, TokenizedClipsConfig

JOB = "kind: prior\nrun: r\ntokenizer: t\ntraining: {steps: 1, batch_size: 1}\ndata: "


def loaded(tmp_path, data):
    (tmp_path / "job.yaml").write_text(JOB + data)
    return load(AnyJobConfig, tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("{latents: a}", CachedLatentsConfig),
        ("{kind: latents, latents: a, mix: {b: {latents: c}}}", CachedLatentsConfig),
        ("{kind: clips, shards: a, clip: {frames: 9}, mix: {b: {shards: c}}}", TokenizedClipsConfig),
    ],
)
def test_kind_decides_and_what_is_written_loads_again_to_the_same(tmp_path, data, kind):
    config = loaded(tmp_path, data)
    assert type(config.data) is kind
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    assert load(AnyJobConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{latent: a}", "unknown key 'data.latent'; did you mean 'latents'"),
        ("{workers: 2}", "key 'data.latents' is missing"),
        ("{kind: clips, latents: a}", "key 'data.shards' is missing"),
        ("{kind: clips, shards: a, clip: {frame: 9}}", "unknown key 'data.clip.frame'; did you mean 'frames'"),
        ("{kind: clips, shards: a, mix: {b: {shard: c}}}", "unknown key 'data.mix.b.shard'; did you mean 'shards'"),
        ("{kind: clip, shards: a}", "key 'data.kind' is 'clip'; known kinds: latents, clips"),
        ("{latents: a, workers: many}", "key 'data.workers' is many; give a whole number"),
        ("7", "key 'data.kind' is missing|key 'data': "),
    ],
)
def test_what_is_wrong_is_named_by_its_key(tmp_path, data, message):
    with pytest.raises(UsageError, match=message):
        loaded(tmp_path, data)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{width: 10, heads: 3}", "even multiple of heads"),
        ("{width: 6, heads: 2}", "even multiple of heads"),
        ("{width: 8, heads: 2}", "heads of 4 channels have no two for each of 3 axes"),
    ],
)
def test_heads_that_cannot_be_rotated_are_refused(tmp_path, model, message):
    with pytest.raises(UsageError, match=message):
        loaded(tmp_path, f"{{latents: a}}\nmodel: {model}")


def test_the_narrowest_heads(tmp_path):
    for axes, width in ((3, 6), (1, 2)):
        model = f"{{width: {width}, heads: 1, rope_axes: {axes}}}"
        assert loaded(tmp_path, f"{{latents: a}}\nmodel: {model}").model.rope_axes == axes
