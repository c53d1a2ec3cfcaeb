"""The order of samples is the same on any number of ranks and workers and for any micro-batch, from any point on."""

import gzip
import json
import tarfile
from collections import Counter, deque
from contextlib import closing
from itertools import count, cycle, islice, product

import numpy as np
import pytest

from data_pipeline import order as order_module
from data_pipeline.config import LatentDataConfig
from data_pipeline.errors import UsageError
from data_pipeline.latents import LatentWriter
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.order import Order, Share
from data_pipeline.seeding import generator
from data_pipeline.stream import latent_batches

CLIPS, STREAMS = 301, 32
SETTINGS = list(product([1, 2, 4, 8], [0, 1, 2, 4]))  # ranks, workers
MICRO_BATCHES = [1, 2, 4]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """301 latents in 48 shards of 6 or 7, with members of 4: streams are unequal and windows too."""
    run = tmp_path_factory.mktemp("latents")
    writer = LatentWriter(
        run / "train",
        clips=CLIPS,
        shards=48,
        grid=(1, 2, 2),
        fingerprint="f",
        codebook_size=512,
        clips_per_member=4,
    )
    ids = np.arange(CLIPS)[:, None, None, None] * np.ones((1, 1, 2, 2), int)
    with writer:
        writer.append(range(CLIPS), ids, [f"clip{n:03d}" for n in range(CLIPS)], [-1] * CLIPS)
    merge(run / "train")
    return run


def by_definition(run, seed, streams=STREAMS):
    """The order as the design defines it, sample by sample, read from the tars by nothing of the stream."""
    shards = read_manifest(run / "train").shards
    windows = [keys_in_windows(run / "train" / f"{shard.name}.tar", shard) for shard in shards]

    deals = (
        (epoch, int(shard)) for epoch in count() for shard in generator("shards", seed, epoch).permutation(len(shards))
    )
    dealt = [deque() for _ in range(streams)]
    turn = cycle(dealt)

    def stream(number):
        while True:
            while not dealt[number]:
                next(turn).append(next(deals))
            epoch, shard = dealt[number].popleft()
            for window, keys in enumerate(windows[shard]):
                for position in generator("window", seed, epoch, shard, window).permutation(len(keys)):
                    yield keys[position]

    opened = [stream(number) for number in range(streams)]
    for n in count():
        yield next(opened[n % streams])


def keys_in_windows(path, shard):
    with tarfile.open(path) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".json.gz"))
        members = [json.loads(gzip.decompress(tar.extractfile(name).read()))["keys"] for name in names]
    assert [len(keys) for keys in members] == shard.window_samples
    return members


def drawn(run, total, ranks, workers, micro_batch, consumed=0, seed=0):
    """The next ``total`` keys, rank by rank put together."""
    config = LatentDataConfig(latents=run, workers=workers, virtual_streams=STREAMS)
    parts = []
    for rank in range(ranks):
        share = Share(rank, ranks, micro_batch)
        with closing(latent_batches(config, "train", seed=seed, share=share, consumed={"main": consumed})) as batches:
            micro_batches = batches.draw(0, total // ranks // micro_batch)
            assert batches.consumed == {"main": consumed + total}
        for batch in micro_batches:  # the latents are those of their keys
            assert [f"clip{int(n):03d}" for n in batch["latent"][:, 0, 0, 0]] == batch["key"]
        parts.append([key for batch in micro_batches for key in batch["key"]])
    return [key for turn in zip(*parts, strict=True) for key in turn]


@pytest.fixture(scope="module")
def order(latents):
    return list(islice(by_definition(latents, seed=0), 3000))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), SETTINGS)
def test_the_order_is_the_definitions_for_every_number_of_ranks_and_workers_and_micro_batch(
    latents, order, ranks, workers
):
    for micro_batch in MICRO_BATCHES:
        assert drawn(latents, 64, ranks, workers, micro_batch) == order[:64]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), SETTINGS)
def test_resuming_after_any_number_of_samples_with_these_settings_gives_exactly_the_next(
    latents, order, ranks, workers
):
    points = generator("points", ranks, workers).integers(2900, size=2).tolist()  # within the first ten epochs
    for consumed, micro_batch in zip(points, (1, 4), strict=True):
        found = drawn(latents, 32, ranks, workers, micro_batch, consumed)
        assert found == order[consumed : consumed + 32], consumed


def test_two_seeds_and_two_epochs_differ_and_an_epoch_has_every_sample_once(latents):
    config = LatentDataConfig(latents=latents, workers=0, virtual_streams=1)
    orders = []
    for seed in (0, 1):
        with closing(latent_batches(config, "train", seed=seed, share=Share(0, 1, CLIPS))) as batches:
            orders += [batch["key"] for batch in batches.draw(0, 2)]
    assert all(Counter(keys) == Counter(orders[0]) and len(set(keys)) == CLIPS for keys in orders)
    assert len({tuple(keys) for keys in orders}) == 4


@pytest.mark.parametrize("consumed", [0, 5_000_000, 10_000_000, 205_000_000])
def test_entering_ten_million_samples_draws_an_order_per_epoch_gone_and_per_window_entered(monkeypatch, consumed):
    drawn = Counter()
    monkeypatch.setattr(order_module, "generator", lambda kind, *name: drawn.update([kind]) or generator(kind, *name))
    order = Order([[16] * 62 + [8]] * 10_000, streams=6144, seed=0)  # 1,000 samples a shard
    list(islice(order.samples(consumed), 64))
    assert drawn["window"] <= 64
    assert drawn["shards"] <= consumed // 10_000_000 + 10  # streams of unequal length are in several epochs at a time


def test_at_most_one_window_per_stream_is_read_to_find_the_place(latents, monkeypatch):
    from data_pipeline import windows

    read = []
    monkeypatch.setattr(
        windows.ShardFiles,
        "read",
        lambda self, shard, *extent, given=windows.ShardFiles.read: read.append(shard) or given(self, shard, *extent),
    )
    config = LatentDataConfig(latents=latents, workers=0, virtual_streams=STREAMS)
    with closing(latent_batches(config, "train", seed=0, share=Share(0, 1, STREAMS), consumed={"main": 2777})) as found:
        found.draw(0)
    assert len(read) <= STREAMS


@pytest.mark.parametrize(
    ("changes", "ranks", "says"),
    [
        ({"workers": 1, "buffer_bytes": 50_000}, 1, r"data.workers=\d+, or data.virtual_streams=\d+"),
        ({"workers": 4, "buffer_bytes": 5_000}, 2, "each of 4 workers of 2 processes would hold 4 of 32 virtual"),
    ],
)
def test_more_windows_than_a_worker_may_hold_are_refused_with_what_would_fit(latents, changes, ranks, says):
    config = LatentDataConfig(latents=latents, virtual_streams=STREAMS, **changes)
    with pytest.raises(UsageError, match=says) as caught:
        latent_batches(config, "train", seed=0, share=Share(0, ranks, 1))
    largest = max(size for shard in read_manifest(latents / "train").shards for size in shard.window_bytes)
    fits = str(caught.value).split("data.workers=")[1].split(",")[0] if "data.workers=" in str(caught.value) else None
    if fits:
        assert STREAMS // (ranks * int(fits)) * largest <= changes["buffer_bytes"]
        latent_batches(config.model_copy(update={"workers": int(fits)}), "train", seed=0, share=Share(0, ranks, 1))


def test_runs_in_braces_are_one_set(latents):
    both = "{" + f"{latents},{latents}" + "}"
    config = LatentDataConfig(latents=both, workers=0, virtual_streams=1)
    with closing(latent_batches(config, "train", seed=0, share=Share(0, 1, 2 * CLIPS))) as batches:
        keys = batches.draw(0)[0]["key"]
    assert Counter(keys) == {f"clip{n:03d}": 2 for n in range(CLIPS)}
    assert keys[:CLIPS] != keys[CLIPS:]


def test_runs_that_hold_different_things_are_not_read_as_one_set(latents, clip_set):
    config = LatentDataConfig(latents="{" + f"{latents},{clip_set}" + "}")
    with pytest.raises(UsageError, match=f"{clip_set}/train: its (kind|grid|.*) is not that of {latents}/train"):
        latent_batches(config, "train", seed=0, share=Share(0, 1, 1))


def test_a_set_that_is_written_anew_is_read_anew(tmp_path):
    for clips in (8, 12):
        writer = LatentWriter(
            tmp_path / "train", clips=clips, shards=2, grid=(1, 1, 1), fingerprint="f", codebook_size=100
        )
        with writer:
            names = [f"clip{n}" for n in range(clips)]
            writer.append(range(clips), np.zeros((clips, 1, 1, 1), int), names, [-1] * clips)
        merge(tmp_path / "train")
        config = LatentDataConfig(latents=tmp_path, workers=0, virtual_streams=1)
        with closing(latent_batches(config, "train", seed=0, share=Share(0, 1, clips))) as batches:
            assert sorted(batches.draw(0)[0]["key"]) == sorted(names)
