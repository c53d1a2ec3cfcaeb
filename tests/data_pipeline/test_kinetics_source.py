import logging

import pytest

from data_pipeline.config import KineticsSource
from data_pipeline.errors import UsageError
from data_pipeline.sources.source import describe, walk

HEAD = "label,youtube_id,time_start,time_end,split\n"
TRAIN = (
    HEAD + '"air drumming",_abc-DEF123,3,13,train\n"air drumming",gone0000000,5,15,train\nyoga,ZZZZZZZZZZZ,0,10,train\n'
)
VAL = HEAD.strip() + ",is_cc\nyoga,0-_0-_0-_0-,100,110,validate,0\nzumba,gone0000001,1,11,val,0\n"


@pytest.fixture
def annotations(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "train.csv").write_text(TRAIN)
    (folder / "val.csv").write_text(VAL)
    (folder / "test.csv").write_text("youtube_id,time_start,time_end,split\nZZZZZZZZZZZ,0,10,test\n")
    return folder


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


LAYOUTS = {
    "by split and label": (
        "train/air drumming/_abc-DEF123_000003_000013.mp4",
        "val/yoga/0-_0-_0-_0-_000100_000110.mkv",
    ),
    "by split": ("train/_abc-DEF123_000003_000013.mp4", "val/0-_0-_0-_0-_000100_000110.mp4"),
    "flat": ("_abc-DEF123_000003_000013.mp4", "0-_0-_0-_0-_000100_000110.webm"),
    "flat by id": ("_abc-DEF123.mp4", "0-_0-_0-_0-.mp4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_clips_that_are_there_with_label_and_split_of_the_csv(annotations, layout, caplog):
    caplog.set_level(logging.INFO)
    root = annotations.parent
    touch(root, *LAYOUTS[layout])
    config = KineticsSource(path=root)
    samples = walk(config)
    assert [(s.split, s.label, s.name) for s in samples] == [
        ("train", "air drumming", LAYOUTS[layout][0]),
        ("val", "yoga", LAYOUTS[layout][1]),
    ]
    assert samples[0].metadata == {"youtube_id": "_abc-DEF123", "time_start": 3, "time_end": 13}
    assert "2 of 5 listed clips are there" in caplog.text
    assert describe(config, samples).classes == ["air drumming", "yoga", "zumba"]


def test_files_that_no_row_names_are_counted_and_no_file_is_two_clips(annotations, caplog):
    root = annotations.parent / "videos"
    touch(root, "ZZZZZZZZZZZ.mp4", "holiday.mp4")
    (annotations / "train.csv").write_text(TRAIN + "yoga,ZZZZZZZZZZZ,20,30,train\n")
    (sample,) = walk(KineticsSource(path=root, annotations=annotations / "train.csv"))
    assert sample.metadata["time_start"] == 0
    assert "1 videos are in no train or validation list" in caplog.text


def test_errors_say_what_where_and_what_to_do(annotations):
    root = annotations.parent
    with pytest.raises(
        UsageError, match="none of the 5 listed clips is there; their files must be called ID_START_END"
    ):
        walk(KineticsSource(path=root))
    with pytest.raises(UsageError, match="no such folder"):
        walk(KineticsSource(path=root / "nowhere"))
    (root / "empty").mkdir()
    with pytest.raises(UsageError, match="no csv file; get the annotations"):
        walk(KineticsSource(path=root / "empty"))
    (annotations / "val.csv").write_text("label,id\nyoga,1\n")
    with pytest.raises(UsageError, match=r"val\.csv: no column youtube_id"):
        walk(KineticsSource(path=root))
    (annotations / "val.csv").write_text(HEAD + "yoga,ZZZZZZZZZZZ,soon,later,val\n")
    with pytest.raises(UsageError, match=r"val\.csv: line 2 has no times"):
        walk(KineticsSource(path=root))
