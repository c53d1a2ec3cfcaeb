import pytest

from data_pipeline.config import KthSource
from data_pipeline.errors import UsageError
from data_pipeline.sources.source import describe, walk

SEQUENCES = """Training:   person 11, 12, 13
person01_boxing_d1\t\tframes\t1-95, 96-185, 186-245, 246-360
person13_handclapping_d3\t*missing*

person17_running_d4\t\tframes\t7-26,\t95-114
"""


@pytest.fixture
def kth(tmp_path):
    for person in (1, 16, 17, 25):
        for action in ("boxing", "running"):
            (tmp_path / action).mkdir(exist_ok=True)
            for scenario in (1, 4):
                (tmp_path / action / f"person{person:02d}_{action}_d{scenario}_uncomp.avi").touch()
    return tmp_path


def test_persons_1_to_16_train_and_17_to_25_validate(kth):
    samples = walk(KthSource(path=kth))
    assert len(samples) == 16
    assert {s.metadata["person"] for s in samples if s.split == "train"} == {1, 16}
    assert {s.metadata["person"] for s in samples if s.split == "val"} == {17, 25}
    assert {s.label for s in samples} == {"boxing", "running"}
    assert {s.metadata["scenario"] for s in samples} == {"outdoors", "indoors"}


def test_all_six_classes_are_numbered_whichever_are_there(kth):
    config = KthSource(path=kth)
    names = ["boxing", "handclapping", "handwaving", "jogging", "running", "walking"]
    assert describe(config, walk(config)).classes == names


def test_sequences_are_counted_from_zero_with_the_end_excluded(kth):
    assert not any("sequences" in s.metadata for s in walk(KthSource(path=kth)))
    (kth / "00sequences.txt").write_text(SEQUENCES)
    found = {s.path.stem: s.metadata["sequences"] for s in walk(KthSource(path=kth)) if "sequences" in s.metadata}
    assert found == {
        "person01_boxing_d1_uncomp": [[0, 95], [95, 185], [185, 245], [245, 360]],
        "person17_running_d4_uncomp": [[6, 26], [94, 114]],
    }


def test_other_files_are_counted_and_none_of_kths_is_an_error(kth, tmp_path, caplog):
    (kth / "boxing" / "holiday.avi").touch()
    assert len(walk(KthSource(path=kth))) == 16
    assert "1 videos are not named as KTH's" in caplog.text
    with pytest.raises(UsageError, match=r"no personNN_ACTION_dM_uncomp\.avi .* unpack the six archives"):
        walk(KthSource(path=tmp_path / "nowhere"))
