import numpy as np

from stpredict.evaluation.pictures import LABEL_HEIGHT, side_by_side, stacked


def test_clips_stand_side_by_side_unchanged_under_their_names():
    left, right = (np.random.default_rng(n).integers(0, 256, (3, 8, 24, 3), dtype=np.uint8) for n in (0, 1))
    row = side_by_side({"truth": left, "a name too long for its clip": right})
    assert row.shape == (3, 8 + LABEL_HEIGHT, 24 + 4 + 24, 3)
    np.testing.assert_array_equal(row[:, LABEL_HEIGHT:, :24], left)
    np.testing.assert_array_equal(row[:, LABEL_HEIGHT:, 28:], right)
    assert (row[:, :LABEL_HEIGHT, :24] < 128).any()  # the label
    assert (row[:, :, 24:28] == 255).all()  # the gap: no label runs into it


def test_grey_clips_become_rgb_and_pixels_are_repeated():
    clip = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    row = side_by_side({"x": clip}, scale=8)
    np.testing.assert_array_equal(row[0, LABEL_HEIGHT + 4 :: 8, 4::8], np.repeat(clip[0], 3, axis=-1))


def test_rows_are_stacked_with_a_gap():
    row = np.zeros((2, 10, 20, 3), np.uint8)
    picture = stacked([row, row])
    assert picture.shape == (2, 24, 20, 3)
    assert (picture[:, 10:14] == 255).all()
