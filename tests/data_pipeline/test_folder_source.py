import pytest

from data_pipeline.config import FolderSource
from data_pipeline.errors import UsageError
from data_pipeline.sources.source import walk


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def walked(root, fraction=0.0):
    return walk(FolderSource(path=root, validation_fraction=fraction))


def test_classes_are_the_folders_and_keys_are_unique_without_dots(tmp_path):
    touch(tmp_path, "a/b.c.avi", "a_b/c.AVI", "a/deep/er/x.mov", "a/b_c.webm", "top.mkv", "ä ö/ü.mp4", "a/notes.txt")
    touch(tmp_path, "a/._b.c.avi")  # what macOS leaves beside files
    samples = walked(tmp_path)
    assert {sample.name: sample.label for sample in samples} == {
        "a/b.c.avi": "a",
        "a/b_c.webm": "a",
        "a/deep/er/x.mov": "a",
        "a_b/c.AVI": "a_b",
        "top.mkv": None,
        "ä ö/ü.mp4": "ä ö",
    }
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    assert not any("." in key or "/" in key or not key.isascii() for key in keys)
    assert keys == [sample.key for sample in walked(tmp_path)]


def test_given_split_is_taken(tmp_path, caplog):
    touch(tmp_path, "train/run/1.mp4", "train/walk/2.mp4", "val/run/1.mp4", "more/run/9.mp4")
    samples = walked(tmp_path, fraction=0.5)
    assert [(s.name, s.split, s.label) for s in samples] == [
        ("train/run/1.mp4", "train", "run"),
        ("train/walk/2.mp4", "train", "walk"),
        ("val/run/1.mp4", "val", "run"),
    ]
    assert "left out: more" in caplog.text
    touch(tmp_path, "test/run/9.mp4")
    assert [(s.name, s.split) for s in walked(tmp_path, fraction=0.5)][3:] == [("test/run/9.mp4", "test")]


def test_a_folder_named_test_without_the_other_splits_is_a_class(tmp_path):
    touch(tmp_path, "test/1.mp4", "test/2.mp4", "run/3.mp4")
    samples = walked(tmp_path, fraction=0.3)
    assert {s.label for s in samples} == {"test", "run"}
    assert {s.split for s in samples} == {"train", "val"}


def test_held_out_videos_stay_held_out_when_others_are_added(tmp_path):
    touch(tmp_path, *(f"c/{number}.mp4" for number in range(300)))
    before = {s.key for s in walked(tmp_path, 0.1) if s.split == "val"}
    assert 15 <= len(before) <= 45
    touch(tmp_path, *(f"c/{number}.mp4" for number in range(300, 600)))
    after = walked(tmp_path, 0.1)
    old = {s.key for s in after if s.split == "val" and int(s.path.stem) < 300}
    assert old == before


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("videos", [2, 3, 10])
def test_both_splits_get_a_video_where_there_are_two(tmp_path, fraction, videos):
    touch(tmp_path, *(f"{number}.mp4" for number in range(videos)))
    assert {s.split for s in walked(tmp_path, fraction)} == {"train", "val"}


@pytest.mark.parametrize(("fraction", "videos"), [(0.0, 10), (0.5, 1)])
def test_nothing_is_held_out_of_one_video_or_by_fraction_zero(tmp_path, fraction, videos):
    touch(tmp_path, *(f"{number}.mp4" for number in range(videos)))
    assert {s.split for s in walked(tmp_path, fraction)} == {"train"}


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "nowhere", "no such folder"),
        (["file.mp4"], "file.mp4", "is a file; source.path must name a folder"),
        (["a/notes.txt"], ".", r"no videos found; looked for \.mp4, \.avi, .* \.webp"),
        (["train/a.mp4"], ".", "has train/ but no val/"),
        (["train/notes.txt", "val/a.mp4"], ".", "train: no videos found"),
    ],
)
def test_errors_say_what_where_and_what_to_do_in_one_line(tmp_path, files, path, message):
    touch(tmp_path, *files)
    with pytest.raises(UsageError, match=message) as caught:
        walked(tmp_path / path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
