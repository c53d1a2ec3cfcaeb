import collections
import json
import multiprocessing
import os
import shutil
import signal
import tarfile

import pytest
import webdataset
from numbered_videos import make_shards, make_videos, touchy_look, write_and_die
from PIL import Image

from data_pipeline.config import FolderSource
from data_pipeline.decode import IMAGE_EXTENSIONS, probe
from data_pipeline.disk import check_space, renamed
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.shards import plan_shards, shard_count, unfinished, write_shards
from data_pipeline.sources.source import describe, make_key, walk
from data_pipeline.verify import verify


def plans_of(videos, shards=4, **changes):
    source = FolderSource(path=videos, validation_fraction=0)
    samples = walk(source)
    dealing = {"shards": shards, "window_bytes": 2**20, "seed": 0, **changes}
    return plan_shards(source, samples, describe(source, samples), **dealing)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def few(tmp_path):
    return make_videos(tmp_path / "few", 9, frames=3)


def test_any_webdataset_reader_reads_them(videos, clip_set):
    manifest = read_manifest(clip_set / "train")
    seen = {}
    for shard in manifest.shards:
        path = str(clip_set / "train" / f"{shard.name}.tar")
        of_shard = list(webdataset.WebDataset(path, shardshuffle=False))
        assert len(of_shard) == shard.samples
        for sample in of_shard:
            about = json.loads(sample["json"])
            assert sample["mp4"] == (videos / about["name"]).read_bytes()
            assert about["label"] == manifest.classes[about["class"]] == about["name"].split("/")[0]
            info = probe(sample["mp4"])
            assert (about["frames"], about["fps"], about["height"], about["width"]) == (12, 10.0, 32, 32)
            assert about["decoder"] == info.decoder
            seen[sample["__key__"]] = about["name"]
    assert len(seen) == len(set(seen.values())) == manifest.samples == 43


def test_a_window_is_a_run_of_whole_samples_within_its_bound(clip_set):
    for shard in read_manifest(clip_set / "train").shards:
        end = 0
        for window in shard.windows:
            assert window.offset == end
            assert window.bytes <= 10_000
            end = window.offset + window.bytes
            with (clip_set / "train" / f"{shard.name}.tar").open("rb") as file:
                file.seek(window.offset)
                with tarfile.open(fileobj=file) as tar:
                    names = [tar.next().name for _ in range(2 * window.count)]
            assert len({name.split(".")[0] for name in names}) == window.count
        assert len(shard.windows) > 1


def test_the_same_videos_give_the_same_bytes(few, tmp_path):
    one, other = (make_shards(few, tmp_path / name, shards=3) / "train" for name in ("one", "other"))
    assert contents(one) == contents(other)


def test_classes_are_spread_over_the_shards(clip_set):
    manifest = read_manifest(clip_set / "train")
    for shard in manifest.shards:
        with tarfile.open(clip_set / "train" / f"{shard.name}.tar") as tar:
            classes = collections.Counter(name.split("_")[0] for name in tar.getnames() if name.endswith("mp4"))
        assert len(classes) > 1


def test_a_rerun_writes_nothing_and_a_changed_video_only_its_shard(few, tmp_path):
    folder = make_shards(few, tmp_path / "out", shards=3) / "train"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    write_shards(folder, plans_of(few, 3, window_bytes=2**24))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == before
    changed = next(few.rglob("video004.mp4"))
    os.utime(changed, ns=(1, 1))
    plans = plans_of(few, 3, window_bytes=2**24)
    assert [[s.path for s in plan.samples].count(changed) for plan in unfinished(folder, plans)] == [1]


def test_fewer_shards_on_a_rerun_leave_none_of_the_old_ones(few, tmp_path):
    make_shards(few, tmp_path / "out", shards=4)
    folder = make_shards(few, tmp_path / "out", shards=2) / "train"
    assert sorted(path.name for path in folder.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert read_manifest(folder).samples == 9
    assert verify(folder) == []


def test_several_processes_write_the_set_that_one_writes(few, tmp_path):
    plans = plans_of(few, 4)
    write_shards(tmp_path / "one", plans)
    for part in (1, 0):
        write_shards(tmp_path / "two", plans[part::2])
        if part == 1:
            with pytest.raises(UserError, match="missing or unfinished: shard-000000, shard-000002"):
                merge(tmp_path / "two")
    merge(tmp_path / "one"), merge(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_merge_names_the_missing_part(few, tmp_path):
    write_shards(tmp_path, plans_of(few, 4)[:2])
    with pytest.raises(UserError, match="of 4 shards missing or unfinished: shard-000002, shard-000003"):
        merge(tmp_path)
    with pytest.raises(UsageError, match=r"there is no manifest\.json in it"):
        read_manifest(tmp_path)


def test_a_killed_writer_leaves_no_half_shard_and_a_rerun_mends_the_set(few, tmp_path):
    folder, plans = tmp_path / "out", plans_of(few, 2)
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(folder, plans))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    write_shards(folder, plans)
    merge(folder)
    assert not list(folder.glob(".*"))
    assert verify(folder) == []


def test_unreadable_videos_are_left_out_counted_and_named(few, tmp_path, caplog):
    bad = few / "class0" / "broken.mp4"
    bad.write_bytes(b"not a video" * 100)
    folder = make_shards(few, tmp_path / "out", shards=2) / "train"
    assert read_manifest(folder).samples == 9
    records = [json.loads(path.read_text()) for path in folder.glob("shard-*.json")]
    (reasons,) = [record["skipped"] for record in records if record["skipped"]]
    assert list(reasons) == [make_key("class0/broken.mp4")]
    assert read_manifest(folder).skipped == 1
    assert any(str(bad) in record.message and "left out: pyav: " in record.message for record in caplog.records)


def test_a_video_that_hangs_or_kills_its_process_is_left_out_by_name_and_all_else_is_written(
    few, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("data_pipeline.shards.look", touchy_look)
    for workers in (1, 3):
        write_shards(tmp_path / str(workers), plans_of(few, 2), workers=workers, timeout_s=2)
        merge(tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    manifest = read_manifest(tmp_path / "1")
    assert (manifest.samples, manifest.skipped) == (7, 2)
    reasons = {}
    for path in (tmp_path / "1").glob("shard-*.json"):
        reasons |= json.loads(path.read_text())["skipped"]
    assert reasons == {
        make_key("class0/video003.mp4"): "took longer than 2 s",
        make_key("class2/video005.mp4"): "the process that read it died (SIGSEGV)",
    }
    assert "video003.mp4: left out: took longer" in caplog.text
    assert "video005.mp4: left out: the process" in caplog.text


def test_images_are_videos_of_one_frame(tmp_path):
    (tmp_path / "images").mkdir()
    for extension in IMAGE_EXTENSIONS:
        Image.new("RGB", (50, 40), "red").save(tmp_path / "images" / f"red.{extension}")
    folder = make_shards(tmp_path / "images", tmp_path / "out", shards=1) / "train"
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    abouts = [json.loads(text) for name, text in members.items() if name.endswith(".json")]
    assert {(about["frames"], about["height"], about["width"]) for about in abouts} == {(1, 40, 50)}
    images = [data for name, data in members.items() if name.endswith(IMAGE_EXTENSIONS)]
    assert sorted(images) == sorted(path.read_bytes() for path in (tmp_path / "images").iterdir())


def test_the_number_of_workers_changes_nothing(few, tmp_path):
    for workers in (1, 2, 5):
        write_shards(tmp_path / str(workers), plans_of(few, 3), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_a_video_that_vanishes_after_it_was_listed_is_left_out(few, tmp_path):
    (few / "class1" / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    plans = plans_of(few, 1)
    (few / "class0" / "video000.mp4").unlink()
    write_shards(tmp_path / "out", plans)
    manifest = merge(tmp_path / "out")
    assert (manifest.samples, manifest.skipped) == (8, 2)


def test_where_the_videos_lie_changes_nothing(few, tmp_path):
    shutil.copytree(few, tmp_path / "moved")  # with the times of the files
    write_shards(tmp_path / "one", plans_of(few, 2))
    write_shards(tmp_path / "other", plans_of(tmp_path / "moved", 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_manifest_that_does_not_say_what_was_skipped_is_read(few, tmp_path):
    path = make_shards(few, tmp_path, shards=2) / "train" / "manifest.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "skipped"}
    path.write_text(json.dumps(older))
    assert read_manifest(path.parent).skipped == 0


def test_two_nodes_with_the_same_process_number_do_not_share_a_temporary_name(tmp_path):
    with renamed(tmp_path / "x") as one, renamed(tmp_path / "x") as other:
        assert one != other
        one.touch(), other.touch()


def test_only_unreadable_videos_fail(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 3 samples could be read"):
        make_shards(tmp_path, tmp_path / "out", shards=2)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9, 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_space(tmp_path, 5_000_000)
    with pytest.raises(UserError, match=f"needs about 20 MB, 5 MB free at {tmp_path}"):
        check_space(tmp_path / "not" / "yet", 20_000_000)


def test_the_space_planned_for_is_enough_and_not_much_more(few, tmp_path):
    (plan,) = plans_of(few, 1)
    write_shards(tmp_path, [plan])
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written <= plan.bytes + 10_240 <= 3 * written


@pytest.mark.parametrize(
    ("samples", "most", "fewest", "shards"),
    [(2000, 96, 4, 96), (2000, 1000, 4, 384), (82, 96, 4, 12), (64, 96, 4, 12), (3, 96, 4, 1), (8, 96, 4, 2)],
)
def test_shard_counts_leave_enough_samples_in_each(samples, most, fewest, shards):
    assert shard_count(samples, most, fewest) == shards
