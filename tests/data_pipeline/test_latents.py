import io
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.config import ClipConfig, LatentDataConfig
from data_pipeline.errors import UserError
from data_pipeline.latents import LatentWriter, default_clips_per_member, latent_shards, to_bfloat16
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.order import Share
from data_pipeline.stream import latent_batches, latent_evaluation_batches
from data_pipeline.verify import verify

GRID = (2, 3, 4)


def tokens(clips, codebook_size, seed=0):
    ids = np.random.default_rng(seed).integers(0, codebook_size, (clips, *GRID))
    ids[0, 0, 0, 0], ids[-1, -1, -1, -1] = 0, codebook_size - 1
    return ids


def writer_of(folder, clips, **changes):
    options = {"grid": GRID, "codebook_size": 512, "fingerprint": "f" * 64, "shards": 4, "clips_per_member": 3}
    return LatentWriter(folder, clips=clips, **options | changes)


def append_missing(writer, latents, batch=5, stop=None):
    """Appends what is missing, in batches, up to position ``stop``; clip n has key cn and label n % 10."""
    positions = [position for part in writer.missing for position in part if stop is None or position < stop]
    for start in range(0, len(positions), batch):
        rows = positions[start : start + batch]
        writer.append(rows, latents[rows], [f"c{row}" for row in rows], [row % 10 for row in rows])


def write(folder, latents, *, writers=1, batch=5, **changes):
    """Writes ``latents`` as ``writers`` processes would, one after another, the last first."""
    for number in reversed(range(writers)):
        with writer_of(folder, len(latents), writer=number, writers=writers, **changes) as writer:
            append_missing(writer, latents, batch)
    return merge(folder)


def read_all(run, **options):
    config = LatentDataConfig(latents=run, workers=options.pop("workers", 0))
    share = Share(**{"rank": 0, "world_size": 1, "batch_size": 4, **options})
    rows = {}
    for item in latent_evaluation_batches(config, "train", share=share):
        for key, latent, label, weight in zip(*(item[n] for n in ("key", "latent", "label", "weight")), strict=True):
            if weight:
                assert key not in rows
                rows[key] = latent, int(label)
    return rows


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (64_000, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_ids_come_back_exactly_from_the_smallest_type(tmp_path, codebook_size, dtype):
    ids = tokens(23, codebook_size)
    assert write(tmp_path / "train", ids, codebook_size=codebook_size).dtype == dtype
    rows = read_all(tmp_path, workers=1)
    assert len(rows) == 23
    for number in range(23):
        latent, label = rows[f"c{number}"]
        assert (latent.dtype, label) == (torch.int64, number % 10)
        np.testing.assert_array_equal(latent, ids[number])
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".npy"))
        array = np.load(io.BytesIO(tar.extractfile(member).read()))
    assert (array.dtype, array.shape) == (np.dtype(dtype), (3, *GRID))


def test_every_id_of_the_largest_16_bit_codebook_comes_back(tmp_path):
    ids = np.arange(65_536).reshape(16, 16, 16, 16)
    write(tmp_path / "train", ids, codebook_size=65_536, grid=(16, 16, 16))
    rows = read_all(tmp_path)
    assert torch.equal(torch.stack([rows[f"c{n}"][0] for n in range(16)]), torch.from_numpy(ids))


def test_every_bfloat16_comes_back_to_the_bit(tmp_path):
    """All 65,536 of them: zeros of both signs, subnormals, infinities, every nan."""
    bits = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).reshape(16, 2, 8, 16, 16)
    floats = (bits.to(torch.int32) << 16).view(torch.float32).numpy()
    manifest = write(tmp_path / "train", floats, codebook_size=None, channels=2, grid=(8, 16, 16))
    assert (manifest.dtype, manifest.latent_channels, manifest.codebook_size) == ("bfloat16", 2, None)
    rows = read_all(tmp_path, workers=1)
    latents = torch.stack([rows[f"c{n}"][0] for n in range(16)])
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents.view(torch.int16), bits.view(torch.int16))


def test_floats_are_rounded_as_torch_rounds_them():
    values = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    halves = (np.arange(0, 2**32, 2**15, dtype=np.uint64).astype(np.uint32)).view(np.float32)  # ties among them
    values = np.concatenate([values, halves, np.float32([3.4e38, -3.4e38, 1e-45])])
    values = np.concatenate([values[~np.isnan(values)], np.array([0x7F800001], np.uint32).view(np.float32)])
    ours = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours[:-1].view(torch.int16), torch.from_numpy(values[:-1]).bfloat16().view(torch.int16))
    assert ours[-1].isnan()


@pytest.mark.parametrize("changes", [{"writers": 2, "batch": 3}, {"writers": 3, "batch": 29}, {"writers": 9}])
def test_the_set_is_the_same_whoever_wrote_it_and_holds_every_clip_once(tmp_path, changes):
    ids, about = tokens(29, 512), {"shards": 6, "clip": ClipConfig(), "classes": list("abcdefghij"), "plan": "one pass"}
    manifest = write(tmp_path / "train", ids, **about, **changes)
    write(tmp_path / "alone" / "train", ids, **about)
    assert contents(tmp_path / "train") == contents(tmp_path / "alone" / "train")
    assert (manifest.kind, manifest.samples, len(manifest.shards)) == ("latents", 29, 6)
    assert (manifest.grid, manifest.codebook_size, manifest.fingerprint) == (GRID, 512, "f" * 64)
    assert (manifest.clip, manifest.classes) == (ClipConfig(), list("abcdefghij"))
    counts = [shard.samples for shard in manifest.shards]
    assert max(counts) - min(counts) <= 1
    assert all(window.count <= 3 for shard in manifest.shards for window in shard.windows)
    assert verify(tmp_path / "train") == []
    rows = read_all(tmp_path, workers=2)
    assert all((rows[f"c{n}"][0].numpy() == ids[n]).all() for n in range(29))


def test_a_writer_that_broke_off_goes_on_behind_its_last_finished_shard(tmp_path):
    ids = tokens(40, 512)

    def broken():
        with writer_of(tmp_path / "train", 40) as writer:
            append_missing(writer, ids, stop=27)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        broken()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    assert {path.name for path in finished} == {f"shard-00000{n}.{end}" for n in (0, 1) for end in ("tar", "json")}
    with writer_of(tmp_path / "train", 40) as writer:
        assert writer.missing == [range(20, 30), range(30, 40)]
        append_missing(writer, ids, batch=7)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    merge(tmp_path / "train")
    write(tmp_path / "whole" / "train", ids)
    assert contents(tmp_path / "train") == contents(tmp_path / "whole" / "train")


def test_finished_shards_are_kept_for_the_same_plan_only(tmp_path):
    with writer_of(tmp_path, 5, writer=1, writers=2, plan="one pass") as first:
        append_missing(first, tokens(5, 512))
    assert writer_of(tmp_path, 5, writer=1, writers=2, plan="one pass").missing == []
    assert len(writer_of(tmp_path, 5, writer=1, writers=2, plan="two passes").missing) == 2
    assert [*writer_of(tmp_path, 5, plan="one pass").missing] == [range(0, 1), range(2, 3)]
    with pytest.raises(UserError, match="shard-000000"):
        merge(tmp_path)


def test_what_killed_and_larger_runs_left_is_removed(tmp_path):
    write(tmp_path, tokens(40, 512), shards=6)
    (tmp_path / ".shard-000001.tar.0123.tmp").touch()
    write(tmp_path, tokens(20, 512), shards=4)
    assert {path.name for path in tmp_path.glob("*shard-*")} == {
        f"shard-{n:06d}.{end}" for n in range(4) for end in ("tar", "json")
    }


def test_clips_that_could_not_be_read_are_left_out(tmp_path):
    ids = tokens(40, 512)
    with writer_of(tmp_path / "train", 40) as writer:
        for n in (n for n in range(40) if n % 3 and not 10 <= n < 20):  # none at all of the second shard
            writer.append([n], ids[n : n + 1], [f"c{n}"], [0])
    manifest = merge(tmp_path / "train")
    assert ([shard.samples for shard in manifest.shards], manifest.samples) == ([6, 7, 6], 19)
    assert all((latent.numpy() == ids[int(key[1:])]).all() for key, (latent, _) in read_all(tmp_path).items())


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.full((1, *GRID), 9), r"ids 9\.\.9, codebook size 9"),
        (np.full((1, *GRID), -1), r"ids -1\.\.-1"),
        (np.zeros((1, 2, 3, 5), int), "expected integers"),
        (np.zeros((1, *GRID)), "expected integers"),
    ],
)
def test_what_does_not_fit_is_refused_instead_of_wrapped(tmp_path, latents, message):
    with pytest.raises(ValueError, match=message), writer_of(tmp_path, 4, codebook_size=9, shards=1) as writer:
        writer.append([0], latents, ["a"], [0])
    assert list(tmp_path.iterdir()) == []


def test_a_position_is_refused_twice(tmp_path):
    with writer_of(tmp_path, 8) as writer:
        writer.append([3], tokens(1, 512), ["a"], [0])  # of the second shard: the first is finished
        with pytest.raises(ValueError, match="position 1 is written already"):
            writer.append([1], tokens(1, 512), ["b"], [0])


def test_training_order_is_one_order_and_resumes(tmp_path):
    write(tmp_path / "train", tokens(40, 512), shards=4)

    def keys(samples, world_size=1, workers=0, batch=1, consumed=0):
        ranks = []
        for rank in range(world_size):
            config = LatentDataConfig(latents=tmp_path, workers=workers)
            share = Share(rank, world_size, batch)
            with closing(latent_batches(config, "train", seed=0, share=share, consumed={"main": consumed})) as batches:
                drawn = batches.draw(0, samples // world_size // batch)
            ranks.append([key for item in drawn for key in item["key"]])
        return [key for turn in zip(*ranks, strict=True) for key in turn]

    one = keys(120)
    assert sorted(one[:40]) != one[:40]
    assert all(one.count(f"c{n}") == 3 for n in range(40))  # three epochs; the shards are of one size
    assert keys(120, world_size=2, workers=2, batch=5) == one
    assert keys(60, world_size=4, workers=1, batch=3, consumed=37) == one[37:97]


@pytest.mark.parametrize(
    ("grid", "codebook_size", "clips"), [((5, 16, 16), 64_000, 300), ((9, 8, 8), 1024, 500)], ids=["NBP", "demo"]
)
def test_tar_headers_keys_and_labels_take_less_than_5_percent(tmp_path, grid, codebook_size, clips):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, codebook_size, (clips, *grid))
    keys = [f"ApplyEyeMakeup_v_ApplyEyeMakeup_g08_c{n:02d}-{rng.bytes(6).hex()}-0" for n in range(clips)]
    writer = writer_of(tmp_path, clips, grid=grid, codebook_size=codebook_size, clips_per_member=None, shards=4)
    with writer:
        writer.append(range(clips), ids, keys, rng.integers(0, 400, clips))
    manifest = merge(tmp_path)
    assert sum(shard.bytes for shard in manifest.shards) < 1.05 * ids.astype(np.uint16).nbytes


def test_members_grow_as_latents_shrink_but_bytes_stay_bounded():
    sizes = (256, 1152, 2560, 2**16, 2**20, 2**24)
    assert [default_clips_per_member(size) for size in sizes] == [899, 200, 90, 64, 4, 1]


def test_any_webdataset_reader_reads_members(tmp_path):
    ids = tokens(8, 512)
    write(tmp_path, ids, shards=1, clips_per_member=8)
    (sample,) = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode()
    np.testing.assert_array_equal(sample["npy"], ids)
    assert sample["json.gz"] == {"keys": [f"c{n}" for n in range(8)], "labels": list(range(8)), "values": "uint16"}


@pytest.mark.parametrize("damaged_block", [1, 2, 3, 4])  # from the window's end: .json.gz and header, .npy and header
def test_a_damaged_member_is_replaced_and_counted(tmp_path, damaged_block):
    write(tmp_path / "train", tokens(40, 512), shards=4)
    window = read_manifest(tmp_path / "train").shards[1].windows[2]
    with (tmp_path / "train" / "shard-000001.tar").open("r+b") as file:
        file.seek(window.offset + window.bytes - 512 * damaged_block)
        file.write(b"\xff" * 300)
    config = LatentDataConfig(latents=tmp_path, workers=0, max_bad_fraction=1)
    items = list(latent_evaluation_batches(config, "train", share=Share(0, 1, 4)))
    assert sum(float(item["weight"].sum()) for item in items) == 40 - window.count
    config = config.model_copy(update={"max_bad_fraction": 0.05})
    with pytest.raises(UserError, match="could not be read"):
        list(latent_evaluation_batches(config, "train", share=Share(0, 1, 4)))


@pytest.mark.parametrize(("clips", "wanted", "shards"), [(2000, 96, 96), (64, 96, 12), (64, 4, 4), (2, 96, 1)])
def test_small_sets_get_few_shards(clips, wanted, shards):
    assert latent_shards(clips, wanted) == shards
