"""The stream as training sees it: real shards, DataLoader workers, batches."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress

import numpy as np
import psutil
import pytest
import torch
from https_server import serving
from numbered_videos import frame_numbers, make_shards

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import read_manifest
from data_pipeline.order import Share
from data_pipeline.stream import clip_batches, clip_evaluation_batches, latent_batches

CLIP = ClipConfig(frames=3, size=(16, 16), stride=2)
SAMPLES = 43


def data(shards, **changes):
    return ClipDataConfig(**{"shards": shards, "clip": CLIP, "workers": 0, "virtual_streams": 8, **changes})


def drawn(config, count, *, share, consumed=0, seed=0, quarantined=None):
    """The next ``count`` batches of one rank."""
    batches = clip_batches(
        config, "train", seed=seed, share=share, consumed={"main": consumed}, quarantined=quarantined
    )
    with closing(batches):
        return [batch for step in range(count) for batch in batches.draw(step)]


def train(shards, samples, *, rank=0, world_size=1, batch=1, consumed=0, seed=0, **changes):
    """The next ``samples`` of one rank: (key, clip bytes)."""
    share = Share(rank, world_size, batch)
    taken = []
    for item in drawn(data(shards, **changes), -(-samples // batch), share=share, consumed=consumed, seed=seed):
        assert item["clip"].shape == (batch, 3, 16, 16, 3)
        assert item["clip"].dtype == torch.uint8
        assert item["label"].dtype == torch.int64
        taken += [(key, clip.numpy().tobytes()) for key, clip in zip(item["key"], item["clip"], strict=True)]
    return taken[:samples]


def all_ranks(shards, samples, world_size, **options):
    parts = [train(shards, samples // world_size, rank=r, world_size=world_size, **options) for r in range(world_size)]
    return [sample for turn in zip(*parts, strict=True) for sample in turn]


def evaluate(shards, world_size=1, batch_size=4, **options):
    config = data(shards, **{name: options.pop(name) for name in list(options) if name in ClipDataConfig.model_fields})
    ranks = []
    for rank in range(world_size):
        share = Share(rank, world_size, batch_size)
        ranks.append(list(clip_evaluation_batches(config, "train", seed=0, share=share, **options)))
    return ranks


@pytest.fixture(scope="module")
def reference(clip_set):
    return train(clip_set, 160)


@pytest.fixture
def broken_set(clip_set, tmp_path):
    """A copy to damage."""
    return shutil.copytree(clip_set, tmp_path / "broken")


def zero_video(folder, shard, member):
    """Overwrites the ``member``-th video of a shard; the tar stays whole. Returns its key."""
    import tarfile

    path = folder / "train" / f"{read_manifest(folder / 'train').shards[shard].name}.tar"
    with tarfile.open(path) as tar:
        info = [m for m in tar.getmembers() if m.name.endswith(".mp4")][member]
    with path.open("r+b") as file:
        file.seek(info.offset_data)
        file.write(bytes(info.size))
    return info.name.removesuffix(".mp4")


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 5])
def test_ranks_workers_and_batch_sizes_change_neither_order_nor_clips(clip_set, reference, world_size, workers, batch):
    assert all_ranks(clip_set, 80, world_size, workers=workers, batch=batch) == reference[:80]


@pytest.mark.parametrize(("consumed", "world_size", "workers"), [(1, 1, 0), (7, 2, 2), (60, 4, 1), (101, 1, 2)])
def test_resuming_anywhere_with_other_settings_goes_on_with_the_next_sample(
    clip_set, reference, consumed, world_size, workers
):
    resumed = all_ranks(clip_set, 40, world_size, workers=workers, batch=2, consumed=consumed)
    assert resumed == reference[consumed : consumed + 40]


def test_two_seeds_and_two_epochs_differ_in_order_and_in_clips(clip_set):
    one_stream = {"virtual_streams": 1}
    both = train(clip_set, 2 * SAMPLES, **one_stream)
    first, second = both[:SAMPLES], both[SAMPLES:]
    other = train(clip_set, SAMPLES, seed=1, **one_stream)
    keys = [[key for key, _ in epoch] for epoch in (first, second, other)]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert keys[0] != keys[1]
    assert keys[0] != keys[2]
    assert dict(first) != dict(second)  # the same videos, cut elsewhere
    assert dict(first) != dict(other)


def test_clips_are_the_frames_they_should_be_and_labels_their_class(clip_set):
    (batches,) = evaluate(clip_set, batch_size=1)
    for item in batches:
        numbers = frame_numbers(item["clip"][0])
        assert numbers == list(range(numbers[0], numbers[0] + 6, 2))
        assert item["key"][0].startswith(f"class{item['label'].item()}_")


def test_several_clips_per_video_are_samples_of_their_own_from_parts_of_their_own(clip_set):
    clip = CLIP.model_copy(update={"per_video": 2, "start": "centre"})
    (batches,) = evaluate(clip_set, batch_size=1, clip=clip)
    found = {item["key"][0]: frame_numbers(item["clip"][0])[0] for item in batches}
    assert len(found) == len(batches) == 2 * SAMPLES
    starts = {key[-2:]: {found[other] for other in found if other.endswith(key[-2:])} for key in found}
    assert starts == {"-0": {1}, "-1": {5}}  # centres of starts 0 to 3 and 4 to 7 (12 frames, 5 spanned)
    trained = train(clip_set, 2 * SAMPLES, clip=clip, virtual_streams=1, workers=1)
    assert sorted(key for key, _ in trained) == sorted(found)
    assert [key for key, _ in train(clip_set, 60, clip=clip, consumed=50)] == [
        key for key, _ in train(clip_set, 110, clip=clip)
    ][50:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_sample_once_in_equally_many_whole_batches(clip_set, world_size, workers):
    ranks = evaluate(clip_set, world_size, workers=workers)
    assert len({len(batches) for batches in ranks}) == 1
    items = [item for batches in ranks for item in batches]
    assert all(item["clip"].shape == (4, 3, 16, 16, 3) for item in items)
    assert all(item["weight"].dtype == torch.float32 and item["index"].dtype == torch.int64 for item in items)
    counted = [
        (int(index), key)
        for item in items
        for index, key, weight in zip(item["index"], item["key"], item["weight"], strict=True)
        if weight
    ]
    assert [index for index, _ in sorted(counted)] == list(range(SAMPLES))
    assert len({key for _, key in counted}) == SAMPLES


def test_evaluation_is_the_same_for_every_world_size_and_another_pass_cuts_other_clips(clip_set):
    def clips(**options):
        items = [item for batches in evaluate(clip_set, **options) for item in batches]
        rows = [zip(i["index"], i["clip"], i["weight"], strict=True) for i in items]
        return {int(index): clip.numpy().tobytes() for row in rows for index, clip, weight in row if weight}

    assert clips() == clips(world_size=3, workers=2, batch_size=7)
    assert clips() != clips(epoch=1)
    assert clips(epoch=1) == clips(epoch=1, world_size=2)


def test_evaluation_stops_at_the_limit(clip_set):
    ranks = evaluate(clip_set, world_size=2, samples=range(5), batch_size=2)
    weights = torch.cat([item["weight"] for batches in ranks for item in batches])
    assert weights.sum() == 5
    assert len(weights) == 8


def test_an_unreadable_video_moves_no_other_and_is_named(clip_set, broken_set, reference, caplog):
    bad = zero_video(broken_set, shard=2, member=1)
    damaged = all_ranks(broken_set, 160, 2, workers=1, max_bad_fraction=1)
    changed = [n for n, (one, other) in enumerate(zip(reference, damaged, strict=True)) if one != other]
    assert changed == [n for n, (key, _) in enumerate(reference) if key == bad]
    shards = read_manifest(clip_set / "train").shards
    with (broken_set / "train" / f"{shards[2].name}.tar").open("rb") as file:
        in_shard = file.read()
    assert all(damaged[n][0] != bad and damaged[n][0].encode() in in_shard for n in changed)
    assert sum(bad in record.message for record in caplog.records) == 2  # once per rank


def test_what_replaces_an_unreadable_video_is_of_its_window(broken_set):
    counts = [window.count for window in read_manifest(broken_set / "train").shards[0].windows]
    bad = {zero_video(broken_set, 0, member) for member in range(1, counts[0])}  # all but the first of window 0
    ((item, *_),) = evaluate(broken_set, batch_size=sum(counts), max_bad_fraction=1)
    first_key = item["key"][0]
    assert first_key not in bad
    assert item["key"][: counts[0]] == [first_key] * counts[0]
    assert first_key not in item["key"][counts[0] :]


def test_samples_that_were_replaced_are_counted(broken_set, reference):
    bad = zero_video(broken_set, shard=2, member=1)
    config = data(broken_set, max_bad_fraction=1)
    with closing(clip_batches(config, "train", seed=0, share=Share(0, 2, 4), consumed={})) as batches:
        for step in range(20):
            batches.draw(step)
        assert batches.replaced == sum(key == bad for key, _ in reference[:160:2]) > 0


def test_an_unreadable_video_has_no_weight_in_evaluation(broken_set):
    bad = zero_video(broken_set, shard=0, member=0)
    ((item, *rest),) = evaluate(broken_set, max_bad_fraction=1)
    assert item["weight"].tolist() == [0, 1, 1, 1]
    assert bad not in item["key"]
    assert sum(float(i["weight"].sum()) for i in [item, *rest]) == SAMPLES - 1


def test_a_shard_cut_short_moves_no_other_sample(broken_set, reference):
    manifest = read_manifest(broken_set / "train")
    shard = manifest.shards[5]
    path = broken_set / "train" / f"{shard.name}.tar"
    whole = train(broken_set, 160, max_bad_fraction=1)
    assert whole == reference
    with path.open("r+b") as file:
        file.truncate(shard.windows[-1].offset + 700)  # the last window has lost everything but a header
    damaged = train(broken_set, 160, max_bad_fraction=1)
    cut = {key for (key, _), (other, _) in zip(reference, damaged, strict=True) if key != other}
    assert len(cut) == shard.windows[-1].count


def test_too_many_unreadable_videos_fail_the_job(broken_set):
    for shard in range(8):
        zero_video(broken_set, shard, member=0)
    with pytest.raises(UserError, match=r"of \d+ samples could not be read, more than max_bad_fraction 0.05"):
        train(broken_set, 160, workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_without_any_readable_video_fails_in_one_line(broken_set, workers):
    for member in range(read_manifest(broken_set / "train").shards[0].samples):
        zero_video(broken_set, 0, member)
    with pytest.raises(UserError, match="no sample can be read") as caught:
        train(broken_set, 160, workers=workers, max_bad_fraction=1)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_fails_by_name(broken_set):
    (broken_set / "train" / "shard-000003.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000003\.tar is missing"):
        train(broken_set, 160, workers=1)


def test_errors_come_when_the_stream_is_opened_not_in_the_first_step(clip_set, tmp_path):
    alone = {"seed": 0, "share": Share(0, 1, 1)}
    with pytest.raises(UsageError, match="no shard set here"):
        clip_batches(data(tmp_path / "nowhere"), "train", **alone)
    with pytest.raises(UsageError, match="cannot share 8 virtual streams"):
        clip_batches(data(clip_set), "train", seed=0, share=Share(0, 3, 1))
    from data_pipeline.config import LatentDataConfig

    with pytest.raises(UsageError, match="holds clips, latents are needed"):
        latent_batches(LatentDataConfig(latents=clip_set), "train", **alone)


def test_reading_leaves_the_random_state_of_training_alone(clip_set):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(clip_set, 10, workers=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_one_shard_feeds_one_process(videos, tmp_path):
    one = make_shards(videos, tmp_path, shards=1)
    assert json.loads((one / "train" / "manifest.json").read_text())["samples"] == SAMPLES
    assert len({key for key, _ in train(one, SAMPLES, virtual_streams=None, workers=1)}) == SAMPLES


MAIN = """
import signal, sys
import psutil
from data_pipeline.config import ClipDataConfig
from data_pipeline.order import Share
from data_pipeline.stream import clip_batches

for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda *_: None)
config = ClipDataConfig.model_validate_json(sys.argv[1])
batches = clip_batches(config, "train", seed=0, share=Share(0, 1, 4))
batches.draw(0)
print(*(child.pid for child in psutil.Process().children()), flush=True)
sys.stdin.readline()
print(sum(len(batch["key"]) for batch in batches.draw(1, 20)), flush=True)
"""


@pytest.fixture
def main_process(clip_set):
    """A main process of two workers, in a group of its own; it goes on when told by a line, and ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, data(clip_set, workers=2).model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    yield process, workers
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_signal_to_the_whole_group_leaves_the_workers_to_the_main_process(main_process, number):
    process, workers = main_process
    os.killpg(process.pid, number)
    time.sleep(0.3)
    began = time.monotonic()
    out, _ = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (0, "80\n")
    assert time.monotonic() - began < 10
    assert psutil.wait_procs(workers, timeout=1)[1] == []


def test_workers_do_not_outlive_a_main_process_that_was_killed(main_process):
    process, workers = main_process
    process.kill()
    assert psutil.wait_procs(workers, timeout=20)[1] == []


BLOCKED = """
import multiprocessing.connection, os, time
import numpy as np
from data_pipeline.workers import items

main, send = os.getpid(), multiprocessing.connection.Connection._send_bytes

def never_in_a_worker(connection, message):
    time.sleep(0 if os.getpid() == main else 1000)
    send(connection, message)

multiprocessing.connection.Connection._send_bytes = never_in_a_worker

def read(worker, workers, received, at):
    yield {"array": np.zeros(8)}, None
    print(os.getpid(), flush=True)
    yield {"array": np.zeros(8)}, None

next(items(read, workers=2, timeout_s=60, held=1, array_bytes=64, quarantined={}, where="somewhere"))
"""


def test_not_even_when_what_they_have_sent_blocks_them():
    """As where another worker was killed with the lock of their pipe."""
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, start_new_session=True)
    try:
        workers = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        process.kill()
        assert psutil.wait_procs(workers, timeout=20)[1] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)


STUCK = """
import time
from torch.utils.data import DataLoader, IterableDataset
from data_pipeline.workers import _outlast_stop_signals

class Stuck(IterableDataset):
    def __iter__(self):
        yield 1
        time.sleep(1000)

options = {"num_workers": 2, "batch_size": None, "worker_init_fn": _outlast_stop_signals}
readings = iter(DataLoader(Stuck(), multiprocessing_context="fork", **options))
next(readings)
"""


@pytest.mark.parametrize("end", ["", "del readings"])
def test_a_main_process_that_ends_does_not_wait_for_a_stuck_worker(end):
    assert subprocess.run([sys.executable, "-c", STUCK + end], timeout=40).returncode == 0


@pytest.mark.parametrize("cached", [False, True])
def test_a_set_behind_https_gives_the_same_clips_through_workers(clip_set, reference, cached, tmp_path, monkeypatch):
    files = {f"set/train/{path.name}": path.read_bytes() for path in (clip_set / "train").iterdir()}
    with serving(tmp_path, monkeypatch, files) as server:
        cache = {"folder": tmp_path / "cache", "bytes": 2**30} if cached else None
        taken = train(f"{server.url}/set", 80, workers=2, cache=cache)
        assert taken == reference[:80]
        tars = [name for name in server.gets if name.endswith(".tar")]
    if cached:
        assert len(tars) == len(set(tars)) == 8  # each shard once, by whichever worker came first
    else:
        assert len(tars) > 8  # a request for each window
