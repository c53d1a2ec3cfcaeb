"""Several sets in one run: which step draws from which, and where each stands."""

from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from numbered_videos import make_shards
from PIL import Image

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.errors import UsageError
from data_pipeline.mixture import chosen
from data_pipeline.order import Share
from data_pipeline.stream import clip_batches
from stpredict.config import validate

CLIP = ClipConfig(frames=3, size=(16, 16))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 pictures, sharded."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(12):
        picture = np.full((40, 48, 3), 10 * n, np.uint8)
        (folder / f"class{n % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"class{n % 2}" / f"picture{n}.{('png', 'jpg', 'webp')[n % 3]}")
    return make_shards(folder, tmp_path_factory.mktemp("images"), shards=4)


@pytest.fixture(scope="module")
def config(clip_set, images):
    mix = {"images": {"shards": str(images), "clip": {"frames": 1, "size": (24, 32)}, "weight": 1}}
    return ClipDataConfig(shards=clip_set, clip=CLIP, weight=3, mix=mix, workers=1, virtual_streams=4)


def steps(config, first, count, *, rank=0, world_size=1, micro=2, per_step=2, consumed=None):
    """What each step draws: the keys of its micro-batches, the shapes of its clips, and the position after it."""
    share = Share(rank, world_size, micro)
    with closing(clip_batches(config, "train", seed=5, share=share, consumed=consumed)) as batches:
        drawn = []
        for step in range(first, first + count):
            micro_batches = batches.draw(step, per_step)
            keys = [key for batch in micro_batches for key in batch["key"]]
            drawn.append((keys, {tuple(batch["clip"].shape[1:]) for batch in micro_batches}, dict(batches.consumed)))
    return drawn


def test_sets_are_chosen_as_often_as_they_weigh_and_by_seed_and_step_alone():
    weights = {"a": 6.0, "b": 3.0, "c": 1.0}
    names = [chosen(weights, 0, step) for step in range(10_000)]
    found = Counter(names)
    for name, weight in weights.items():
        expected = 1000 * weight
        assert abs(found[name] - expected) < 5 * np.sqrt(expected)  # five standard deviations or more
    assert names == [chosen(weights, 0, step) for step in range(10_000)]
    assert names != [chosen(weights, 1, step) for step in range(10_000)]
    assert {chosen({"only": 0.3}, 0, step) for step in range(100)} == {"only"}


def test_a_step_draws_from_one_set_at_its_resolution_and_each_set_keeps_its_own_place(config):
    drawn = steps(config, 0, 40)
    kinds = Counter()
    for keys, shapes, consumed in drawn:
        of_images = {"picture" in key for key in keys}
        assert len(of_images) == 1
        kind = "images" if of_images == {True} else "main"
        assert shapes == {(1, 24, 32, 3) if kind == "images" else (3, 16, 16, 3)}
        kinds[kind] += 4
        assert consumed == {"main": kinds["main"], "images": kinds["images"]}
    assert 0 < kinds["images"] < kinds["main"]


def test_the_mixture_resumes_at_any_step_with_other_ranks_and_micro_batches(config):
    whole = steps(config, 0, 30)
    at = 17
    position = whole[at - 1][2]
    ranks = [
        steps(config, at, 13, rank=rank, world_size=2, micro=1, per_step=2, consumed=position) for rank in range(2)
    ]
    for one, *others in zip(whole[at:], *ranks, strict=True):
        together = [key for turn in zip(*(keys for keys, _, _ in others), strict=True) for key in turn]
        assert together == one[0]
        assert all(consumed == one[2] for _, _, consumed in others)


def test_a_set_that_joins_later_begins_at_its_beginning(config):
    alone = config.model_copy(update={"mix": {}})
    position = steps(alone, 0, 5)[-1][2]
    assert position == {"main": 20}
    joined = steps(config, 5, 20, consumed=position)
    first_of_images = next(keys for keys, _, _ in joined if "picture" in keys[0])
    fresh = next(keys for keys, _, _ in steps(config, 0, 30) if "picture" in keys[0])
    assert first_of_images == fresh


def test_keys_of_a_mixed_clip_that_are_left_out_are_as_in_the_main_one():
    data = {"shards": "a", "clip": {"frames": 9, "channels": 1}, "mix": {"b": {"shards": "b", "clip": {"frames": 1}}}}
    (other,) = validate(ClipDataConfig, data, "data.yaml").mix.values()
    assert (other.clip.frames, other.clip.channels) == (1, 1)


def test_a_mixed_set_that_the_readers_cannot_share_is_named_by_its_own_key(config):
    mix = {"images": config.mix["images"].model_copy(update={"virtual_streams": 3})}
    config = config.model_copy(update={"mix": mix})
    with pytest.raises(UsageError, match=r"or data\.mix\.images\.virtual_streams=4"):
        clip_batches(config, "train", seed=0, share=Share(0, 4, 1))


def test_the_name_of_the_set_outside_the_mix_is_taken(clip_set):
    data = {"shards": str(clip_set), "mix": {"main": {"shards": str(clip_set)}}}
    with pytest.raises(UsageError, match="'main' is the set outside the mix"):
        validate(ClipDataConfig, data, "data.yaml")
