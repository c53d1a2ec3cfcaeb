"""The arithmetic of the stream, without files."""

from collections import Counter
from itertools import islice

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.order import FileOrder, Order, Share, divisible_count, shares, stream_count

COUNTS = [[3, 4], [5], [1, 1, 1], [6, 2], [7], [2, 2, 2], [4], [3, 3], [5, 1]]  # samples per shard and window
TOTAL = sum(map(sum, COUNTS))


def first(count, order, **where):
    return [slot for _, slot in islice(order.samples(where.pop("consumed", 0), **where), count)]


@pytest.mark.parametrize("streams", [1, 2, 4, 9])
def test_every_sample_comes_once_per_epoch(streams):
    slots = first(TOTAL * 30, Order(COUNTS, streams, seed=3))
    everything = {(shard, w, p) for shard, ws in enumerate(COUNTS) for w, n in enumerate(ws) for p in range(n)}
    for epoch in range(10):  # streams of unequal length are in different epochs at one time: count by epoch
        seen = [slot[1:] for slot in slots if slot.epoch == epoch]
        assert len(seen) == len(everything)
        assert set(seen) == everything


@pytest.mark.parametrize("readers", [1, 2, 4, 8])
@pytest.mark.parametrize("consumed", [0, 1, 5, 1000])
def test_readers_together_take_the_samples_of_one_reader_in_turn(readers, consumed):
    order = Order(COUNTS, 8, seed=0)
    together = [first(50, order, consumed=consumed, reader=reader, readers=readers) for reader in range(readers)]
    turns = [slot for turn in zip(*together, strict=True) for slot in turn]
    assert turns == first(50 * readers, order, consumed=consumed)


@pytest.mark.parametrize("consumed", [1, 7, 36, 37, 500])
def test_entering_at_n_gives_what_comes_after_n(consumed):
    order = Order(COUNTS, 4, seed=0)
    assert first(100, order, consumed=consumed) == first(consumed + 100, order)[consumed:]


def test_streams_stay_in_step_where_they_do_not_divide_the_shards():
    slots = first(10_000, Order([[1]] * 10, 6, seed=0))
    for start in range(0, 10_000, 60):
        epochs = {slot.epoch for slot in slots[start : start + 6]}  # what the six streams are at
        assert max(epochs) - min(epochs) <= 1
    seen = Counter(slot.shard for slot in slots)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_no_two_readers_share_a_stream():
    order = Order(COUNTS, 8, seed=0)
    streams = [{stream for stream, _ in islice(order.samples(3, reader, 4), 200)} for reader in range(4)]
    assert sum(map(len, streams)) == len(set.union(*streams)) == 8


def test_seeds_and_epochs_differ_and_the_same_seed_agrees():
    def epochs(seed):
        slots = first(TOTAL * 2, Order(COUNTS, 1, seed))
        return [[slot[1:] for slot in slots[:TOTAL]], [slot[1:] for slot in slots[TOTAL:]]]

    assert epochs(0) == epochs(0)
    orders = [*epochs(0), *epochs(1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_the_order_of_shards_depends_on_seed_and_epoch():
    single = [[1]] * 20
    orders = [[slot.shard for slot in first(40, Order(single, 1, seed))] for seed in (0, 1)]
    assert len({tuple(order[start : start + 20]) for order in orders for start in (0, 20)}) == 4


def test_the_order_within_a_window_depends_on_seed_epoch_shard_and_window():
    orders = {}
    for seed in (0, 1):
        for slot in first(400, Order([[50, 50], [50, 50]], 1, seed)):
            orders.setdefault((seed, *slot[:3]), []).append(slot.position)
    assert len(orders) == 16  # 2 seeds, 2 epochs, 2 shards, 2 windows
    assert len(set(map(tuple, orders.values()))) == len(orders)


def test_the_whole_window_is_shuffled_and_windows_are_never_mixed():
    slots = first(100, Order([[50, 50]], 1, seed=0))
    assert [slot.window for slot in slots] == [0] * 50 + [1] * 50
    assert sorted(slot.position for slot in slots[:50]) == list(range(50))
    assert [slot.position for slot in slots[:50]] != list(range(50))


def test_file_order_gives_each_sample_of_the_set_in_turn():
    order = FileOrder(COUNTS)
    expected = [(9, s, w, p) for s, ws in enumerate(COUNTS) for w, n in enumerate(ws) for p in range(n)]
    assert [tuple(order.slot(index, epoch=9)) for index in range(TOTAL)] == expected


@pytest.mark.parametrize("samples", [1, 3, 8, 10, 37])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_share_evaluation_once_each_in_equally_many_whole_batches(samples, world_size, batch_size):
    parts = [shares(range(samples), Share(rank, world_size, batch_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) % batch_size == 0
    assert sorted(index for part in parts for index, counted in part if counted) == list(range(samples))
    assert all(0 <= index < samples for part in parts for index, _ in part)


def test_counts_are_the_largest_that_many_numbers_divide():
    known = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 11: 6, 12: 12, 47: 24, 48: 48, 95: 48, 96: 96, 191: 96, 192: 192}
    assert {most: divisible_count(most) for most in known} == known
    assert divisible_count(1000) == 768


@pytest.mark.parametrize(
    ("shards", "wanted", "world_size", "workers", "says"),
    [
        (96, None, 2, 5, "data.workers=1 or 2 or 3 or 4, or data.virtual_streams=90"),
        (96, None, 5, 1, "resources.processes=1 or 2 or 3 or 4, or data.virtual_streams=95"),
        (1, None, 2, 1, "resources.processes=1, or shard again into more shards"),
        (2, None, 2, 2, "workers=1, or shard again"),
        (6, 8, 1, 1, "virtual_streams=8, but only 6 shards; use at most 6"),
    ],
)
def test_ranks_that_cannot_share_the_streams_are_told_what_would_do(shards, wanted, world_size, workers, says):
    with pytest.raises(UsageError, match=says):
        stream_count(shards, wanted, world_size, workers, "data")


@pytest.mark.parametrize(
    ("shards", "wanted", "world_size", "workers", "streams"),
    [(96, None, 4, 0, 96), (100, None, 8, 3, 96), (5, None, 2, 2, 4), (7, 7, 7, 1, 7), (1, None, 1, 0, 1)],
)
def test_default_and_wanted_streams(shards, wanted, world_size, workers, streams):
    assert stream_count(shards, wanted, world_size, workers, "data") == streams
