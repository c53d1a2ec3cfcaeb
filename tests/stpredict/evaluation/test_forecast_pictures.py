import numpy as np
from PIL import Image

from stpredict.evaluation.forecast_pictures import as_pixels, field_strip, frame_strip, write_forecast_pictures
from stpredict.evaluation.pictures import LABEL_HEIGHT
from tests.stpredict.evaluation.made_forecasts import field, hourly, index_of, video


def test_truth_prediction_and_error_stand_under_each_other_column_by_column():
    given, truth, prediction = (x[0] for x in video(size=100, channels=3))
    strip = frame_strip(given, truth, prediction)
    step, high = 100 + 2, LABEL_HEIGHT + 100 + 4
    for column in range(4):
        at = [strip[row * high + LABEL_HEIGHT :][:100, column * step :][:, :100] for row in range(4)]
        if column:
            np.testing.assert_array_equal(at[0], given[column - 1])  # three given frames, to the right
        else:
            assert (at[0] == 255).all()
        np.testing.assert_array_equal(at[1], truth[column])
        np.testing.assert_array_equal(at[2], as_pixels(prediction[column]))
        error = np.abs(prediction[column].astype(float) - truth[column])
        assert np.abs(at[3] - error.clip(0, 255)).max() <= 0.5


def test_values_outside_the_grey_levels_are_clipped_not_wrapped():
    assert as_pixels(np.array([-3.0, 254.6, 300.0])).tolist() == [0, 255, 255]


def test_small_frames_are_drawn_larger_and_long_horizons_thinned():
    given, truth, prediction = (np.repeat(x[0], 5, axis=0) for x in video(size=20))
    assert frame_strip(given, truth, prediction).shape == (4 * (LABEL_HEIGHT + 40) + 3 * 4, 8 * 40 + 7 * 2, 3)


def test_truth_and_prediction_of_a_field_share_the_truths_scale_and_errors_are_symmetric():
    given, truth, prediction = (x[0] for x in field(channels=2))
    prediction[0, 0, 0, 0] = 1000  # an outlier: it must not flatten the truth
    figure = field_strip(given, truth, prediction, ["t2m", "z"], ["K", "m"], ["+1 h", "+2 h", "+3 h", "+4 h"])
    images = [image for axes in figure.axes for image in axes.images]
    grids = {image.axes.get_subplotspec().rowspan.start: [] for image in images}
    for image in images:
        grids[image.axes.get_subplotspec().rowspan.start].append(image)
    seen = np.concatenate([given[-1:], truth])[..., 0]
    assert [len(grids[row]) for row in range(6)] == [5, 4, 4] * 2
    for image in grids[0] + grids[1]:
        assert image.get_clim() == (seen.min(), seen.max())
    low, high = grids[2][0].get_clim()
    assert low == -high == -np.abs(prediction[..., 0].astype(float) - truth[..., 0]).max()
    np.testing.assert_array_equal(grids[4][3].get_array(), prediction[3, ..., 1])
    assert [image.axes.get_title() for image in grids[0]] == ["given", "+1 h", "+2 h", "+3 h", "+4 h"]
    bars = [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert bars == ["K"] * 3 + ["m"] * 3


def test_north_is_up():
    given, truth, prediction = (x[0] for x in field())
    index = index_of(given[None], truth[None], latitudes=[50.0, 51, 52, 53, 54, 55])
    assert index.origin == "lower"
    assert index.model_copy(update={"latitudes": index.latitudes[::-1]}).origin == "upper"
    assert index.model_copy(update={"latitudes": None}).origin == "upper"
    figure = field_strip(given, truth, prediction, ["t2m"], ["K"], list("abcd"), "lower")
    images = [image for axes in figure.axes if axes.get_label() != "<colorbar>" for image in axes.images]
    assert {image.origin for image in images} == {"lower"}


def test_pictures_are_named_by_number_and_key(tmp_path):
    made = given, truth, _ = video(n=3)
    write_forecast_pictures(tmp_path / "none", index_of(given, truth), *made, count=0)
    (tmp_path / "video").mkdir()
    write_forecast_pictures(tmp_path / "video", index_of(given, truth), *made, count=2)
    names = {path.name for path in (tmp_path / "video").iterdir()}
    assert names == {f"00{n}_sample-{n}.{kind}" for n in range(2) for kind in ("png", "gif", "mp4")}
    with Image.open(tmp_path / "video/000_sample-0.gif") as picture:
        assert picture.n_frames == 7
    made = given, truth, _ = field(n=3)
    (tmp_path / "field").mkdir()
    write_forecast_pictures(tmp_path / "field", index_of(given, truth, **hourly(3)), *made, count=5)
    assert len(list((tmp_path / "field").glob("*.png"))) == 3
