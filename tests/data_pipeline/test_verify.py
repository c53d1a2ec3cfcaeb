"""Every kind of damage to a shard set is a named problem, and a sound set has none."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numbered_videos import make_shards, make_videos, numbered_frames

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description, merge, read_manifest
from data_pipeline.tar_shard import TarShard
from data_pipeline.verify import verify
from data_pipeline.video_files import write_mp4

ABOUT = {"class": 0, "frames": 3, "height": 32, "width": 32}
CLIPS = Description(kind="clips", classes=["a"])
IDS = Description(kind="latents", grid=(1, 2, 2), codebook_size=300, dtype="uint16", fingerprint="f")


class Unpickled:
    """What an object array must never become."""

    def __reduce__(self):
        return (print, ("unpickled!",))


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_set(folder: Path, *shards: list[tuple], description=CLIPS, window_bytes=2**20) -> Path:
    """A set whose manifest agrees with its tars, of samples (key, members, KEY.json[, count])."""
    folder.mkdir()
    for index, samples in enumerate(shards):
        tar = TarShard(folder, index, window_bytes)
        for sample in samples:
            tar.add(*sample)
        tar.finish(description, len(shards), "plan")
    merge(folder)
    return folder


def lines(folder, **options) -> list[str]:
    return [str(problem) for problem in verify(folder, **options)]


@pytest.fixture(scope="session")
def mp4(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("mp4") / "a.mp4"
    write_mp4(path, numbered_frames(3), fps=10)
    return path.read_bytes()


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A set of 12 videos in 2 shards of several windows, to be copied before it is damaged."""
    videos = make_videos(tmp_path_factory.mktemp("few"), 12, frames=3)
    return make_shards(videos, tmp_path_factory.mktemp("sound"), shards=2, window_bytes=10_000) / "train"


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    for path in sound.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_sound_set_has_no_problem_and_every_byte_is_counted(sound):
    steps = []
    assert verify(sound, workers=2, progress=lambda done, total: steps.append((done, total))) == []
    total = sum(shard.bytes for shard in read_manifest(sound).shards)
    assert len(steps) == 12 + 1
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


@pytest.mark.parametrize(
    ("members", "about", "reason"),
    [
        (lambda mp4: {"mp4": mp4}, None, r"has \.mp4; a sample has \.json and one of"),
        (lambda mp4: {}, ABOUT, r"has \.json; a sample has \.json and one of"),
        (lambda mp4: {"mp4": mp4, "avi": mp4}, ABOUT, r"has \.avi \.json \.mp4; a sample has"),
        (lambda mp4: {"mp4": mp4, "json": b"{"}, None, r"its \.json is damaged"),
        (lambda mp4: {"mp4": mp4[:200]}, ABOUT, "moov|invalid|Invalid|decord"),
        (lambda mp4: {"mp4": mp4}, {**ABOUT, "frames": 4}, "frames 3, 4 expected"),
        (lambda mp4: {"mp4": mp4}, {**ABOUT, "height": 64}, "height 32, 64 expected"),
        (lambda mp4: {"mp4": mp4}, {**ABOUT, "class": 1}, "class 1, the set has 1"),
        (lambda mp4: {"npy": npy(np.zeros((3, 32, 32, 3), np.uint8))}, ABOUT, None),
        (lambda mp4: {"npy": npy(np.zeros((3, 16, 32, 3), np.uint8))}, ABOUT, "height 16, 32 expected"),
        (lambda mp4: {"npy": npy(np.zeros((3, 32, 32, 3), np.float32))}, ABOUT, "dtype float32, uint8 expected"),
        (lambda mp4: {"npy": npy(np.zeros((3, 32, 32, 3), np.uint8))[:-9]}, ABOUT, "bytes"),
        (lambda mp4: {"npy": npy(np.array([Unpickled()]))}, ABOUT, "pickle"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said_under_its_key(tmp_path, mp4, capfd, members, about, reason):
    good = {"mp4": mp4}
    folder = write_set(tmp_path / "set", [("one", good, ABOUT), ("two", members(mp4), about), ("three", good, ABOUT)])
    found = verify(folder)
    if reason is None:
        assert found == []
    else:
        ((shard, key, said),) = found
        assert (shard, key) == ("shard-000000.tar", "two")
        assert "\n" not in said
        assert re.search(reason, said)
    assert "unpickled!" not in capfd.readouterr().out


@pytest.mark.parametrize("key", ["../up", "/etc/absolute", "a/../../b", "two.dots/x", "\udc80\n", ".hidden"])
def test_names_that_lead_elsewhere_or_hide_are_refused(tmp_path, mp4, key):
    folder = write_set(tmp_path / "set", [("good", {"mp4": mp4}, ABOUT), (key, {"mp4": mp4}, ABOUT)])
    found = verify(folder)
    assert {problem.reason for problem in found if problem.key} == {
        "not the name of a member: KEY.EXTENSION, without dots or .. in KEY"
    }
    assert all(str(problem).isprintable() for problem in found)
    assert any(problem.reason.endswith(" hold 1 samples, 2 expected") for problem in found)


def test_a_link_is_no_member(tmp_path, mp4):
    folder = write_set(tmp_path / "set", [("one", {"mp4": mp4}, ABOUT)])
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo("one.mp4")
    header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
    data[:512] = header.tobuf()[:512]
    path.write_bytes(data)
    assert any("one.mp4: a link, folder or device" in line for line in lines(folder))


def test_a_key_that_is_there_twice_is_named_with_both_shards(tmp_path, mp4):
    one, two = ("one", {"mp4": mp4}, ABOUT), ("two", {"mp4": mp4}, ABOUT)
    assert lines(write_set(tmp_path / "across", [one], [two, one])) == [
        "shard-000001.tar: one: is there twice: in shard-000000.tar too"
    ]
    found = lines(write_set(tmp_path / "within", [one, two, one]))
    assert "shard-000000.tar: one: .mp4 is there twice" in found
    assert any(line.endswith(" hold 2 samples, 3 expected") for line in found)
    found = lines(write_set(tmp_path / "windows", [one, two, one], window_bytes=1))
    assert found == ["shard-000000.tar: one: is there twice: in shard-000000.tar too"]


def test_a_truncated_tar_is_named_and_the_samples_before_the_cut_are_still_examined(copy):
    path = copy / "shard-000001.tar"
    windows = read_manifest(copy).shards[1].windows
    size = windows[1].offset + windows[1].bytes // 2 + 700
    path.write_bytes(path.read_bytes()[:size])
    found = lines(copy)
    assert all(line.startswith("shard-000001.tar: ") for line in found)
    assert found[0].endswith("bytes expected") or f"{size} bytes" in found[0]
    assert any("damaged from byte" in line or "cut off" in line for line in found)
    assert not any(f"bytes 0 to {windows[0].bytes} hold" in line for line in found)


def test_garbage_in_the_middle_hides_no_other_window(copy):
    path, windows = copy / "shard-000000.tar", read_manifest(copy).shards[0].windows
    assert len(windows) > 2
    data = bytearray(path.read_bytes())
    data[windows[1].offset : windows[1].offset + 1024] = bytes(range(256)) * 4
    data[windows[2].offset + 600] ^= 255  # in the first member of the next window
    path.write_bytes(data)
    found = lines(copy)
    assert "shard-000000.tar: sha256 differs from the manifest's" in found
    assert any(f"damaged from byte {windows[1].offset} on" in line for line in found)
    counts = [line for line in found if " hold " in line]
    assert len(counts) == 1
    assert f"bytes {windows[1].offset} to {windows[2].offset} hold 0 samples, " in counts[0]


def test_problems_come_in_the_order_of_the_shards_whoever_finds_them(copy):
    for number in range(2):
        path = copy / f"shard-00000{number}.tar"
        content = bytearray(path.read_bytes())
        content[512:600] = bytes(88)  # of a member: the hash differs, and the sample cannot be decoded
        path.write_bytes(content)
    found = [problem.shard for problem in verify(copy)]
    assert len(found) >= 4
    assert found == sorted(found)


def test_a_shard_that_is_gone_or_another_is_named(copy):
    (copy / "shard-000000.tar").unlink()
    assert lines(copy) == ["shard-000000.tar: missing"]


def test_a_manifest_that_contradicts_itself_is_named(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["samples"] += 1
    manifest["shards"][1]["window_samples"][0] += 1
    path.write_text(json.dumps(manifest))
    found = lines(copy)
    assert "manifest.json: says 13 samples, its shards say otherwise" in found
    assert "manifest.json: shard-000001: its windows are not what the shard is said to hold" in found


def test_a_sample_that_takes_too_long_is_named(tmp_path, mp4):
    folder = write_set(tmp_path / "set", [("one", {"mp4": mp4}, ABOUT)])
    assert lines(folder, timeout_s=1e-6) == ["shard-000000.tar: one: took longer than 1e-06 s"]


@pytest.mark.parametrize(
    ("ids", "about", "reason"),
    [
        (np.full((2, 1, 2, 2), 299, np.uint16), {}, None),
        (np.full((2, 1, 2, 2), 300, np.uint16), {}, "id 300, codebook size 300"),
        (np.zeros((2, 1, 2, 3), np.uint16), {}, "uint16 of shape (1, 2, 3), uint16 of shape (1, 2, 2) expected"),
        (np.zeros((2, 1, 2, 2), np.int64), {}, "int64 of shape (1, 2, 2), uint16 of shape (1, 2, 2) expected"),
        (np.zeros((3, 1, 2, 2), np.uint16), {}, "2 keys, 2 labels, 3 latents; 2 clips expected"),
        (np.zeros((2, 1, 2, 2), np.uint16), {"keys": ["x"]}, "1 keys, 2 labels, 2 latents; 2 clips expected"),
        (np.zeros((2, 1, 2, 2), np.uint16), {"labels": [-1, 7]}, "class 7, the set has 0"),
        (np.zeros((2, 1, 2, 2), np.uint16), {"keys": ["x", "x"]}, "is there twice: in shard-000000.tar too"),
    ],
)
def test_latents_are_ids_below_the_codebook_with_a_key_and_a_label_each(tmp_path, ids, about, reason):
    contents = json.dumps({"keys": ["x", "y"], "labels": [-1, -1], "values": "uint16", **about})
    members = {"npy": npy(ids), "json.gz": gzip.compress(contents.encode())}
    folder = write_set(tmp_path / "set", [("member", members, None, 2)], description=IDS)
    assert [problem.reason for problem in verify(folder)] == [reason] * bool(reason)


def test_a_url_is_refused_in_a_line():
    with pytest.raises(UsageError, match="copy it to this machine"):
        verify("https://example.org/set")


def test_a_latent_member_that_asks_to_unpickle_is_refused_and_not_run(tmp_path, capfd):
    about = gzip.compress(json.dumps({"keys": ["a"], "labels": [0]}).encode())
    folder = write_set(
        tmp_path / "set", [("m", {"npy": npy(np.array([Unpickled()])), "json.gz": about})], description=IDS
    )
    assert lines(folder) == ["shard-000000.tar: m: npy: holds pickled objects, which could run code; store numbers"]
    assert "unpickled" not in capfd.readouterr().out
