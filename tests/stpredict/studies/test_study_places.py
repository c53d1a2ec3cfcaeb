import pytest

from stpredict.evaluation.units import count, formula, power
from stpredict.studies.places import in_order, number_of, numbers_of, short


@pytest.mark.parametrize(
    ("label", "axis", "number"),
    [
        ("seed1", "seed", 1),
        ("lr3e-3", "lr", 0.003),
        ("lr1_5e-4", "lr", 0.00015),
        ("block1x4x4", "block", 16),
        ("s700M", "size", 7e8),
        ("1_2B", "size", 1.2e9),
        ("w32", "size", 32),
        ("cosine", "schedule", None),
        ("nbp-2-deep", "config", None),
    ],
)
def test_the_number_of_a_label(label, axis, number):
    assert number_of(label, axis) == (None if number is None else pytest.approx(number))


def test_labels_come_in_the_order_of_their_numbers_or_as_they_are():
    assert in_order(["block1x1x16", "block1x1x2", "block1x1x16"], "block") == ["block1x1x2", "block1x1x16"]
    assert in_order(["wide", "deep"]) == ["wide", "deep"]


def test_shapes_of_as_many_tokens_are_no_numbers():
    assert numbers_of(["block1x1x16", "block1x4x4"], "block") is None
    assert numbers_of(["block1x1x16", "block1x4x8"], "block") == {"block1x1x16": 16, "block1x4x8": 32}
    assert short("block1x4x8", "block") == "1x4x8"
    assert short("blockade", "block") == "blockade"


def test_numbers_as_people_read_them():
    assert [count(n) for n in (12, 92_320, 999_960, 1.2e9)] == ["12", "92.3 k", "1 M", "1.2 B"]
    superscripts = "\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT FIVE}"
    assert [power(2.624e15), power(1e15)] == [f"2.62\N{MIDDLE DOT}10{superscripts}", f"10{superscripts}"]
    assert formula("A N^-alpha < 1") == "A N<sup>-\N{GREEK SMALL LETTER ALPHA}</sup> &lt; 1"
