"""Folding the shards of a set: what is missing or of another set is named; equal sets give equal bytes."""

import json
import random

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.latents import LatentWriter
from data_pipeline.manifest import (
    Description,
    Manifest,
    Moments,
    Shard,
    clear,
    find_manifest,
    fold,
    merge,
    read_manifest,
    write_manifest,
)
from data_pipeline.tar_shard import TarShard


def write(folder, indices, shards=6, plan="p", moments=None):
    folder.mkdir(exist_ok=True)
    for index in indices:
        tar = TarShard(folder, index, 2**20)
        tar.add(f"{plan}{index}", {"npy": bytes(100)}, {})
        tar.finish(Description(kind="clips", plan=plan), shards, plan, {"lost": "why"}, moments)
    return folder


def test_missing_shards_are_named_with_the_parts_that_write_them(tmp_path):
    write(tmp_path, [0, 1, 3, 4])
    with pytest.raises(UserError, match=r"of 6 shards missing or unfinished: shard-000002, shard-000005; run the job"):
        fold(tmp_path)
    with pytest.raises(UserError, match=r"run part 2 of 3 again"):
        fold(tmp_path, parts=3)
    (tmp_path / "shard-000004.tar").write_bytes(b"half")
    with pytest.raises(UserError, match=r"shard-000004.*; run part 1, 2 of 3 again"):
        fold(tmp_path, parts=3)


def test_shards_of_another_set_are_named_the_first_one_too(tmp_path):
    write(tmp_path, [1, 2, 4, 5])
    write(tmp_path, [0, 3], plan="q")
    with pytest.raises(UserError, match=r"of another set: shard-000000, shard-000003; run part 0 of 3 again"):
        fold(tmp_path, parts=3)
    write(tmp_path, [0, 3, 7], shards=8)
    with pytest.raises(UserError, match=r"of another set: shard-000000, shard-000003, shard-000007"):
        fold(tmp_path)


def test_skipped_samples_are_counted_and_moments_added_up(tmp_path):
    values = np.random.default_rng(0).normal(5, 3, (6, 50))
    for index, of_shard in enumerate(values):
        mean = of_shard.mean()
        write(tmp_path, [index], moments=Moments(count=50, mean=[mean], m2=[((of_shard - mean) ** 2).sum()]))
    manifest = merge(tmp_path)
    assert (manifest.samples, manifest.skipped) == (6, 6)
    assert manifest.moments.mean[0] == pytest.approx(values.mean())
    assert manifest.moments.m2[0] / manifest.moments.count == pytest.approx(values.var())
    assert read_manifest(tmp_path) == manifest


def test_clearing_some_shards_leaves_those_of_others(tmp_path):
    write(tmp_path, range(6))
    (tmp_path / ".shard-000001.tar.ab.tmp").touch()
    (tmp_path / ".shard-000002.tar.ab.tmp").touch()
    (tmp_path / "manifest.json").touch()
    clear(tmp_path, [1, 4], shards=5)
    left = {path.name.lstrip(".")[:12] for path in tmp_path.iterdir()}
    assert left == {f"shard-00000{index}" for index in (0, 2, 3, 5)}
    assert (tmp_path / ".shard-000002.tar.ab.tmp").exists()  # another process is at it
    assert not (tmp_path / "manifest.json").exists()  # it would speak of shards that are gone
    clear(tmp_path, [0], shards=5)
    assert not (tmp_path / "shard-000005.tar").exists()


def test_other_files_in_the_folder_are_neither_counted_nor_removed(tmp_path):
    write(tmp_path, range(6))
    for name in ("shard-notes.txt", "shard-list.json"):
        (tmp_path / name).write_text("mine")
    assert fold(tmp_path).samples == 6
    clear(tmp_path, list(range(6)), 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-list.json", "shard-notes.txt"]


def test_a_record_that_a_crash_of_the_machine_left_as_garbage_is_an_unfinished_shard(tmp_path):
    write(tmp_path, range(6))
    (tmp_path / "shard-000002.json").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"missing or unfinished: shard-000002; run the job"):
        fold(tmp_path)


def test_latents_of_several_writers_are_merged_to_the_bytes_of_one(tmp_path):
    tokens = np.arange(24).reshape(24, 1, 1, 1)
    about = {"clips": 24, "shards": 6, "grid": (1, 1, 1), "codebook_size": 24, "fingerprint": "f"}

    def encode(folder, number, writers):
        with LatentWriter(folder, **about, writer=number, writers=writers) as writer:
            for positions in writer.missing:
                keys = [f"clip{position}" for position in positions]
                writer.append(positions, tokens[positions.start : positions.stop], keys, [-1] * len(keys))

    (one := tmp_path / "one" / "train").mkdir(parents=True)
    (two := tmp_path / "two" / "train").mkdir(parents=True)
    encode(one, 0, 1)
    encode(two, 1, 2)
    with pytest.raises(UserError, match="run part 0 of 2 again"):
        fold(two, parts=2)
    encode(two, 0, 2)
    merge(one), merge(two)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_a_manifest_has_a_line_per_shard_and_is_read_as_it_was_written(tmp_path):
    draw = random.Random(0)
    sizes = [[draw.randrange(10**7) for _ in range(64)] for _ in range(50)]
    shards = [
        Shard(
            name=f"shard-{i:06d}", samples=64, bytes=2**40, sha256="a" * 64, window_bytes=size, window_samples=[1] * 64
        )
        for i, size in enumerate(sizes)
    ]
    manifest = Manifest(kind="clips", classes=["é"], samples=3200, shards=shards)
    (tmp_path / ".manifest.json.ab.tmp").touch()  # of a merge that was killed
    write_manifest(tmp_path, manifest)
    text = (tmp_path / "manifest.json").read_text()
    assert sum('"name"' in line for line in text.splitlines()) == 50
    assert len(text) < 60_000
    assert json.loads(text)["classes"] == ["é"]
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_where_there_is_no_set_none_is_found(tmp_path):
    (tmp_path / "file").touch()
    assert find_manifest(tmp_path) is find_manifest(tmp_path / "no") is find_manifest(tmp_path / "file") is None
