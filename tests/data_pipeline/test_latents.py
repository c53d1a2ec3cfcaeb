import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch

from data_pipeline.config import ClipConfig, LatentDataConfig
from data_pipeline.errors import UserError
from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import merge, read_manifest, verify
from data_pipeline.stream import latent_batches, latent_evaluation_batches

GRID = (2, 3, 4)


def tokens(clips, codebook_size, seed=0):
    ids = np.random.default_rng(seed).integers(0, codebook_size, (clips, *GRID))
    ids[0, 0, 0, 0], ids[-1, -1, -1, -1] = 0, codebook_size - 1
    return ids


def write(
    folder, ids, *, codebook_size=512, shards=4, world_size=1, clips_per_member=3, batch=5, ranks=None, **changes
):
    """Writes ``ids`` as ``world_size`` ranks would, each a contiguous part; clip n has key cn and label n % 10."""
    parts = np.array_split(np.arange(len(ids)), world_size)
    for rank in range(world_size) if ranks is None else ranks:
        writer = LatentWriter(
            folder,
            grid=GRID,
            codebook_size=codebook_size,
            fingerprint="f" * 64,
            clips_per_member=clips_per_member,
            shards=shards,
            rank=rank,
            world_size=world_size,
            **changes,
        )
        with writer:
            for start in range(0, len(parts[rank]), batch):
                rows = parts[rank][start : start + batch]
                writer.append(ids[rows], [f"c{row}" for row in rows], [row % 10 for row in rows])
        assert writer.finished
    return merge(folder)


def read_all(run, **options):
    config = LatentDataConfig(latents=run, workers=options.pop("workers", 0))
    options = {"seed": 0, "rank": 0, "world_size": 1, "batch_size": 4, **options}
    rows = {}
    for item in latent_evaluation_batches(config, "train", **options):
        assert item["latent"].dtype == torch.int64
        assert item["latent"].shape == (options["batch_size"], *GRID)
        for key, latent, label, weight in zip(*(item[n] for n in ("key", "latent", "label", "weight")), strict=True):
            if weight:
                assert key not in rows
                rows[key] = latent.numpy(), int(label)
    return rows


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (64_000, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_ids_come_back_exactly_from_the_smallest_type(tmp_path, codebook_size, dtype):
    ids = tokens(23, codebook_size)
    write(tmp_path / "train", ids, codebook_size=codebook_size)
    rows = read_all(tmp_path)
    assert len(rows) == 23
    for number in range(23):
        latent, label = rows[f"c{number}"]
        np.testing.assert_array_equal(latent, ids[number])
        assert label == number % 10
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".npy"))
        array = np.load(io.BytesIO(tar.extractfile(member).read()))
    assert (array.dtype, array.shape) == (np.dtype(dtype), (3, *GRID))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_write_one_set_in_which_every_clip_is_once(tmp_path, world_size):
    ids = tokens(29, 512)
    manifest = write(tmp_path / "train", ids, shards=6, world_size=world_size, clip=ClipConfig(), classes=["a", "b"])
    assert (manifest.kind, manifest.samples, len(manifest.shards)) == ("latents", 29, 6)
    assert (manifest.grid, manifest.codebook_size, manifest.fingerprint) == (GRID, 512, "f" * 64)
    assert (manifest.clip, manifest.classes) == (ClipConfig(), ["a", "b"])
    counts = [shard.samples for shard in manifest.shards]
    assert max(counts) - min(counts) <= 1 + (world_size > 1)
    assert all(window.count <= 3 for shard in manifest.shards for window in shard.windows)
    assert verify(tmp_path / "train") == []
    rows = read_all(tmp_path, world_size=1, workers=2)
    assert all((rows[f"c{n}"][0] == ids[n]).all() for n in range(29))


def test_a_rank_that_finished_is_not_asked_again_until_the_plan_changes(tmp_path):
    def writer(rank, plan):
        options = {"grid": GRID, "codebook_size": 512, "fingerprint": "f", "clips_per_member": 3, "shards": 4}
        return LatentWriter(tmp_path, **options, rank=rank, world_size=2, plan=plan)

    with writer(1, "one pass") as first:
        first.append(tokens(5, 512), list("abcde"), [0] * 5)
    assert writer(1, "one pass").finished
    assert not writer(1, "two passes").finished
    assert not writer(0, "one pass").finished
    with pytest.raises(UserError, match="shard-000000 is missing"):
        merge(tmp_path)


def test_an_error_while_encoding_leaves_no_shard(tmp_path):
    writer = LatentWriter(tmp_path, grid=GRID, codebook_size=9, fingerprint="f", clips_per_member=1, shards=2)

    def encode():
        with writer:
            writer.append(tokens(5, 9), list("abcde"), [0] * 5)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.full((1, *GRID), 9), r"ids 9\.\.9, codebook size 9"),
        (np.full((1, *GRID), -1), r"ids -1\.\.-1"),
        (np.zeros((1, 2, 3, 5), int), "expected integers"),
        (np.zeros((1, *GRID)), "expected integers"),
    ],
)
def test_what_does_not_fit_is_refused_instead_of_wrapped(tmp_path, ids, message):
    writer = LatentWriter(tmp_path, grid=GRID, codebook_size=9, fingerprint="f", clips_per_member=1, shards=1)
    with pytest.raises(ValueError, match=message), writer:
        writer.append(ids, ["a"], [0])


def test_training_order_is_one_order_and_resumes(tmp_path):
    write(tmp_path / "train", tokens(40, 512), shards=4)

    def keys(samples, world_size=1, workers=0, batch=1, consumed=0):
        ranks = []
        for rank in range(world_size):
            config = LatentDataConfig(latents=tmp_path, workers=workers)
            where = {"rank": rank, "world_size": world_size, "batch_size": batch, "consumed": consumed}
            batches = latent_batches(config, "train", seed=0, **where)
            taken = [key for item in islice(batches, samples // world_size // batch) for key in item["key"]]
            ranks.append(taken)
        return [key for turn in zip(*ranks, strict=True) for key in turn]

    one = keys(120)
    assert sorted(one[:40]) != one[:40]
    assert all(one.count(f"c{n}") == 3 for n in range(40))  # three epochs; the shards are of one size
    assert keys(120, world_size=2, workers=2, batch=5) == one
    assert keys(60, world_size=4, workers=1, batch=3, consumed=37) == one[37:97]


def test_keys_and_latents_stay_together_and_tar_overhead_is_small(tmp_path):
    ids = np.random.default_rng(0).integers(0, 64_000, (512, 5, 16, 16))
    writer = LatentWriter(
        tmp_path / "train", grid=(5, 16, 16), codebook_size=64_000, fingerprint="f", clips_per_member=64, shards=4
    )
    with writer:
        writer.append(ids, [f"video-{n:06d}" for n in range(512)], [-1] * 512)
    manifest = merge(tmp_path / "train")
    assert sum(shard.bytes for shard in manifest.shards) < 1.05 * ids.astype(np.uint16).nbytes
    with tarfile.open(tmp_path / "train" / "shard-000001.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    keys = json.loads(next(v for k, v in members.items() if k.endswith("000000.json")))["keys"]
    assert keys[:2] == ["video-000001", "video-000005"]


@pytest.mark.parametrize("damaged_block", [1, 2, 3])  # from the end of the window: data and header of .npy, then .json
def test_a_damaged_member_is_replaced_and_counted(tmp_path, damaged_block):
    write(tmp_path / "train", tokens(40, 512), shards=4)
    window = read_manifest(tmp_path / "train").shards[1].windows[2]
    with (tmp_path / "train" / "shard-000001.tar").open("r+b") as file:
        file.seek(window.offset + window.bytes - 512 * damaged_block)
        file.write(b"\xff" * 300)
    config = LatentDataConfig(latents=tmp_path, workers=0, max_bad_fraction=1)
    items = list(latent_evaluation_batches(config, "train", seed=0, rank=0, world_size=1, batch_size=4))
    assert sum(float(item["weight"].sum()) for item in items) == 40 - window.count
    config = config.model_copy(update={"max_bad_fraction": 0.05})
    with pytest.raises(UserError, match="could not be read"):
        list(latent_evaluation_batches(config, "train", seed=0, rank=0, world_size=1, batch_size=4))


@pytest.mark.parametrize(
    ("clips", "wanted", "world_size", "shards"),
    [(2000, 96, 2, 96), (64, 96, 1, 12), (64, 4, 2, 4), (6, 96, 4, 4), (2, 96, 1, 1)],
)
def test_every_rank_gets_a_shard_and_small_sets_get_few(clips, wanted, world_size, shards):
    assert latent_shards(clips, wanted, world_size) == shards


def test_more_ranks_than_clips_still_make_a_set(tmp_path):
    manifest = write(tmp_path / "train", tokens(2, 512), shards=4, world_size=4)
    assert (manifest.samples, len(manifest.shards)) == (2, 2)
    assert set(read_all(tmp_path)) == {"c0", "c1"}
