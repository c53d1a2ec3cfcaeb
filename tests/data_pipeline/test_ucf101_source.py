import logging

import pytest

from data_pipeline.config import Ucf101Source
from data_pipeline.errors import UsageError
from data_pipeline.sources.source import describe, walk

VIDEOS = ["JumpRope/v_JumpRope_g01_c01.avi", "JumpRope/v_JumpRope_g08_c01.avi", "JumpingJack/v_JumpingJack_g08_c02.avi"]


@pytest.fixture
def ucf(tmp_path):
    """Three videos and fold 1: two for training, one for testing. classInd.txt sorts as the published one does."""
    root, lists = tmp_path / "UCF-101", tmp_path / "UCF-101" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    for name in VIDEOS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (lists / "classInd.txt").write_text("1 JumpingJack\r\n2 JumpRope\r\n3 YoYo\r\n")
    (lists / "trainlist01.txt").write_text(f"{VIDEOS[1]} 2\r\n{VIDEOS[2]} 1\r\n")
    (lists / "testlist01.txt").write_text(f"{VIDEOS[0]}\r\n")
    return root


def test_the_lists_are_the_split_and_class_ind_numbers_the_classes(ucf):
    config = Ucf101Source(path=ucf)
    samples = walk(config)
    assert [(s.split, s.label, s.name) for s in samples] == [
        ("train", "JumpRope", VIDEOS[1]),
        ("train", "JumpingJack", VIDEOS[2]),
        ("val", "JumpRope", VIDEOS[0]),
    ]
    assert all(s.path.is_file() for s in samples)
    assert describe(config, samples).classes == ["JumpingJack", "JumpRope", "YoYo"]
    (ucf / "ucfTrainTestlist" / "classInd.txt").unlink()
    assert describe(config, samples).classes == ["JumpRope", "JumpingJack"]


def test_lists_may_lie_beside_the_videos_or_where_the_config_says(ucf):
    expected = walk(Ucf101Source(path=ucf))
    (ucf / "ucfTrainTestlist").rename(ucf.parent / "ucfTrainTestlist")
    assert walk(Ucf101Source(path=ucf)) == expected
    (ucf.parent / "ucfTrainTestlist").rename(ucf.parent / "elsewhere")
    assert walk(Ucf101Source(path=ucf, lists=ucf.parent / "elsewhere")) == expected


def test_videos_in_no_list_and_listed_ones_that_are_absent_are_counted(ucf, caplog):
    caplog.set_level(logging.INFO)
    (ucf / "JumpRope" / "v_JumpRope_g25_c01.avi").touch()
    (ucf / VIDEOS[0]).unlink()
    assert len(walk(Ucf101Source(path=ucf))) == 2
    assert "1 videos are in no list and are left out, such as JumpRope/v_JumpRope_g25_c01.avi" in caplog.text
    assert f"1 listed videos are not there, such as {VIDEOS[0]}" in caplog.text


def test_errors_say_what_where_and_what_to_do(ucf, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        walk(Ucf101Source(path=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"no trainlist02\.txt; unpack .* of https://www\.crcv\.ucf\.edu"):
        walk(Ucf101Source(path=ucf, fold=2))
    for name in VIDEOS[:2]:
        (ucf / name).unlink()
    with pytest.raises(UsageError, match=r"2 of the 3 videos that .* lists are not there"):
        walk(Ucf101Source(path=ucf))
    (ucf / "ucfTrainTestlist" / "testlist01.txt").unlink()
    with pytest.raises(UsageError, match=r"testlist01\.txt: missing"):
        walk(Ucf101Source(path=ucf))


def test_a_class_that_class_ind_does_not_have_is_an_error(ucf):
    config = Ucf101Source(path=ucf)
    (ucf / "ucfTrainTestlist" / "classInd.txt").write_text("1 JumpRope\n")
    with pytest.raises(UsageError, match="has no class JumpingJack"):
        describe(config, walk(config))
