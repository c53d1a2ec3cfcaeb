"""Tars that are damaged or a stranger's: each bad sample is skipped by name, all others stay where they were."""

import io
import json
import tarfile
from contextlib import closing

import numpy as np
import pytest

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.order import Share
from data_pipeline.stream import clip_batches, clip_evaluation_batches

SAMPLES = 6


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def frames(n):
    return np.full((3, 8, 8, 3), n, np.uint8)


def good(n):
    return [(f"key{n}.npy", npy(frames(n))), (f"key{n}.json", json.dumps({"class": n, "label": "x"}).encode())]


def about(n, text):
    return [(f"key{n}.npy", npy(frames(n))), (f"key{n}.json", text.encode())]


def write_set(folder, members, damage=None):
    """One shard of six samples in one window, with the manifest of an undamaged one."""
    (folder / "train").mkdir(parents=True)
    path = folder / "train" / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    size = path.stat().st_size
    if damage:
        damage(path)
    shard = Shard(
        name="shard-000000", samples=SAMPLES, bytes=size, sha256="", window_bytes=[size], window_samples=[SAMPLES]
    )
    manifest = Manifest(kind="clips", samples=SAMPLES, shards=[shard])
    (folder / "train" / "manifest.json").write_text(manifest.model_dump_json(exclude_none=True))
    return folder


def config(folder, workers):
    clip = ClipConfig(frames=3, size=(8, 8))
    return ClipDataConfig(shards=folder, clip=clip, workers=workers, max_bad_fraction=1)


def evaluated(folder, workers=1):
    """What stands at each of the six places: the label, or None where it counts for nothing."""
    batches = clip_evaluation_batches(config(folder, workers), "train", seed=0, share=Share(0, 1, 2))
    items = [item for batch in batches for item in zip(batch["label"], batch["clip"], batch["weight"], strict=True)]
    for label, clip, _ in items:
        assert (clip.numpy() == int(label)).all()  # a clip always is its label's
    return [int(label) if weight else None for label, _, weight in items]


def with_third(replacement):
    return [member for n in range(SAMPLES) for member in (replacement if n == 2 else good(n))]


def cut(path):
    with path.open("r+b") as file:
        file.truncate(offset_of(path, "key3.npy") + 300)


def garbage(path):
    with path.open("r+b") as file:
        file.seek(offset_of(path, "key3.npy") - 512)
        file.write(b"\xee" * 512)


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


class Payload:
    """Unpickling it would leave a trace."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


BAD_SAMPLES = {
    "without json": (good(2)[:1], "its .json is missing"),
    "without array": (good(2)[1:], "no .npy/"),
    "leading out": ([(f"../../{name}", data) for name, data in good(2)], "leads out of its folder"),
    "absolute": ([(f"/etc/{name}", data) for name, data in good(2)], "leads out of its folder"),
    "long": ([("k" * 300 + name[4:], data) for name, data in good(2)], "more than 255 characters"),
    "not utf-8": ([("k\udcff" + name, data) for name, data in good(2)], "unprintable"),
    "pickled": (
        [("key2.npy", npy(np.array([Payload()], object), allow_pickle=True)), good(2)[1]],
        "pickled objects, which could run code",
    ),
    "float": ([("key2.npy", npy(frames(2).astype(np.float32))), good(2)[1]], "float32 (3, 8, 8, 3) where the set has"),
    "cut array": ([("key2.npy", good(2)[0][1][:-100]), good(2)[1]], "bytes, 576 claimed by shape"),
    "too short": ([("key2.npy", npy(frames(2)[:2])), good(2)[1]], "2 frames found, 3 needed"),
    "json is a list": (about(2, "[1]"), "its .json is damaged"),
    "json is null": (about(2, "null"), "its .json is damaged"),
    "json is cut": (about(2, '{"class": 2'), "its .json is damaged"),
    "class is text": (about(2, '{"class": "two"}'), "its .json is not as we write it"),
    "class is missing": (about(2, "{}"), "its .json is not as we write it"),
    "size is null": (
        [("key2.mp4", b"video"), ("key2.json", json.dumps({"class": 2, "frames": 3, "fps": 1, "height": None,
                                                           "width": 8, "decoder": "pyav",
                                                           "decoder_version": "1"}).encode())],
        "its .json is not as we write it: height",
    ),
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_skipped_by_name_and_moves_no_other(case, workers, tmp_path, caplog):
    members, reason = BAD_SAMPLES[case]
    folder = write_set(tmp_path / "set", with_third(members))
    assert evaluated(folder, workers) == [0, 1, None, 3, 4, 5]
    (told,) = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert reason in told
    assert "\n" not in told
    told.encode()  # without what no log file takes


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("members", "damage", "reason"),
    [
        (with_third(good(2)), cut, "missing in the tar (unexpected end of data)"),
        (with_third(good(2)), garbage, "missing in the tar (fewer members than the manifest says)"),
        ([*(m for n in range(3) for m in good(n)), *good(3), good(3)[0], *good(4), *good(5)], None, "duplicate"),
        ([m for n in range(3) for m in good(n)], None, "fewer members than the manifest says"),
    ],
    ids=["truncated", "garbage in the middle", "a key twice", "members missing"],
)
def test_what_follows_damage_in_a_window_is_skipped_by_name(members, damage, reason, workers, tmp_path, caplog):
    folder = write_set(tmp_path / "set", members, damage)
    assert evaluated(folder, workers) == [0, 1, 2, None, None, None]
    told = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert len(told) == 3
    assert all("window 0, sample" in line and reason in line for line in told)


def test_training_replaces_bad_samples_by_good_ones_of_the_window(tmp_path):
    folder = write_set(tmp_path / "set", with_third(BAD_SAMPLES["pickled"][0]))
    whole = write_set(tmp_path / "whole", with_third(good(2)))

    def labels(where):
        with closing(clip_batches(config(where, 1), "train", seed=0, share=Share(0, 1, 12))) as batches:
            return batches.draw(0)[0]["label"].tolist()

    before, after = labels(whole), labels(folder)
    assert [n for n, (one, other) in enumerate(zip(before, after, strict=True)) if one != other] == [
        n for n, label in enumerate(before) if label == 2
    ]
    assert 2 not in after
