import io

import h5py
import numpy as np
import pytest

from data_pipeline.config import TaxiBjSource
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.manifest import merge
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources import taxibj
from data_pipeline.sources.source import describe, read, walk


@pytest.fixture(autouse=True)
def _forget_open_files():
    yield
    taxibj._member.cache_clear()
    taxibj._opened.cache_clear()


def arrays_of(config, samples):
    return [np.load(io.BytesIO(read(config, sample)[1])) for sample in samples]


def of(split, samples):
    return [sample for sample in samples if sample.split == split]


@pytest.fixture
def dataset(tmp_path):
    """dataset.npz in its published layout: 40 and 6 entries."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}_{part}": rng.uniform(-1, 1, (count, 4, 2, 32, 32)).astype(np.float32)
        for part, count in (("train", 40), ("test", 6))
        for name in "XY"
    }
    np.savez(tmp_path / "dataset.npz", **arrays)
    return tmp_path, arrays


def test_x_and_y_of_the_npz_are_joined_and_between_0_and_1(dataset):
    folder, arrays = dataset
    config = TaxiBjSource(path=folder)
    samples = walk(config)
    assert {split: len(of(split, samples)) for split in ("train", "val", "test")} == {"train": 29, "val": 4, "test": 6}
    for sample, array in zip(samples, arrays_of(config, samples), strict=True):
        part = "test" if sample.split == "test" else "train"
        number = int(sample.name.split("/")[1])
        assert array.shape == (8, 32, 32, 2)
        assert array.dtype == np.float32
        expected = [(arrays[f"{name}_{part}"][number, t] + 1) / 2 for name in "XY" for t in range(4)]
        for frame, flows in zip(array, expected, strict=True):
            np.testing.assert_allclose(frame[..., 0], flows[0], rtol=1e-6)
            np.testing.assert_allclose(frame[..., 1], flows[1], rtol=1e-6)
    described = describe(config, samples)
    assert (described.channels, described.units) == (["inflow", "outflow"], ["of the range"] * 2)


def test_of_the_npz_no_entry_for_training_shares_half_hours_with_validation(dataset):
    samples = walk(TaxiBjSource(path=dataset[0] / "dataset.npz", validation_fraction=0.25))
    numbers = {split: [s.item["index"] for s in of(split, samples)] for split in ("train", "val")}
    assert numbers == {"train": [*range(23)], "val": [*range(30, 40)]}  # entry 22 ends with half hour 29


def test_statistics_of_the_training_split_are_numpys(dataset, tmp_path):
    folder, arrays = dataset
    config = TaxiBjSource(path=folder, validation_fraction=0)
    samples = walk(config)
    plans = plan_shards(config, of("train", samples), describe(config, samples), shards=3, window_bytes=2**20, seed=0)
    write_shards(tmp_path / "out", plans)
    moments = merge(tmp_path / "out").moments
    joined = (np.concatenate([arrays["X_train"], arrays["Y_train"]], axis=1).astype(np.float64) + 1) / 2
    np.testing.assert_allclose(moments.mean, joined.mean((0, 1, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.array(moments.m2) / moments.count), joined.std((0, 1, 3, 4)), rtol=1e-6)


def slots(day, first, last):
    return [f"{day}{half:02}".encode() for half in range(first, last + 1)]


@pytest.fixture
def originals(tmp_path):
    """Two of the original files, small ones: 2013 with a gap of a half hour in its second day, 2014 with two days."""
    dates = {
        "13": [*slots("20131231", 25, 48), *slots("20140101", 1, 20), *slots("20140101", 22, 48)],
        "14": [*slots("20140301", 1, 48), *slots("20140302", 1, 48)],
    }
    rng = np.random.default_rng(0)
    flows = {year: rng.integers(-3, 1000, (len(of_year), 2, 32, 32)).astype(float) for year, of_year in dates.items()}
    flows["14"][-48:] *= 2  # on the day of the test
    for year in dates:
        with h5py.File(tmp_path / f"BJ{year}_M32x32_T30_InOut.h5", "w") as file:
            file["data"], file["date"] = flows[year], dates[year]
    return tmp_path, dates, flows


def test_sequences_of_the_original_files_have_no_gaps_and_no_half_hour_is_in_two_splits(originals):
    config = TaxiBjSource(path=originals[0], test_days=1, validation_fraction=0.2)
    samples = walk(config)
    times = {split: set() for split in ("train", "val", "test")}
    for sample in samples:
        start = np.datetime64(sample.metadata["time"])
        times[sample.split].update((start + np.arange(8) * np.timedelta64(30, "m")).tolist())
        assert sample.metadata["interval_h"] == 0.5
    assert max(times["train"]) < min(times["val"])
    assert max(times["val"]) < min(times["test"])
    there = {
        np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:8]}") + np.timedelta64(30 * (int(d[8:]) - 1), "m")
        for date in (*originals[1]["13"], *originals[1]["14"])
        if (d := date.decode())
    }
    assert set().union(*times.values()) == {time.item() for time in there}
    assert len(of("test", samples)) == 48 - 7
    # Runs of 44 and 27 and, before the test, 48 half hours have 37 + 20 + 41 sequences; training lacks those that reach
    # into validation.
    assert len(of("val", samples)) == round(0.2 * 98)
    assert len(of("train", samples)) == 98 - round(0.2 * 98) - 7


def test_flows_of_the_original_files_are_scaled_by_the_range_before_the_test(originals):
    folder, dates, flows = originals
    config = TaxiBjSource(path=folder, test_days=1)
    samples = walk(config)
    before = np.concatenate([flows["13"], flows["14"][:48]])
    assert samples[0].metadata["range"] == [0.0, before.max()]
    for sample, array in zip(samples, arrays_of(config, samples), strict=True):
        year = sample.path.name[2:4]
        time = sample.metadata["time"]
        half = int(time[11:13]) * 2 + int(time[14:16]) // 30 + 1
        first = dates[year].index(f"{time[:10].replace('-', '')}{half:02}".encode())
        expected = flows[year][first : first + 8].clip(min=0) / before.max()
        np.testing.assert_allclose(array, expected.transpose(0, 2, 3, 1), rtol=1e-6)
    assert max(array.max() for array in arrays_of(config, of("test", samples))) > 1.5


def nothing(folder):
    pass


def another_shape(folder):
    np.savez(folder / "dataset.npz", **{f"{n}_{p}": np.zeros((9, 4, 32, 32)) for n in "XY" for p in ("train", "test")})


def no_members(folder):
    np.savez(folder / "dataset.npz", X_train=np.zeros(3))


def text(folder):
    (folder / "BJ13_M32x32_T30_InOut.h5").write_text("no file")


def no_dates(folder):
    with h5py.File(folder / "BJ13_M32x32_T30_InOut.h5", "w") as file:
        file["data"] = np.zeros((9, 2, 32, 32))


def odd_dates(folder):
    with h5py.File(folder / "BJ13_M32x32_T30_InOut.h5", "w") as file:
        file["data"], file["date"] = np.zeros((9, 2, 32, 32)), [b"2013070149"] * 9


def few_dates(folder):
    with h5py.File(folder / "BJ13_M32x32_T30_InOut.h5", "w") as file:
        file["data"], file["date"] = np.zeros((9, 2, 32, 32)), slots("20130701", 1, 8)


def no_flow(folder):
    with h5py.File(folder / "BJ13_M32x32_T30_InOut.h5", "w") as file:
        file["data"], file["date"] = np.zeros((48, 2, 32, 32)), slots("20130701", 1, 48)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, r"neither dataset\.npz nor BJ13"),
        (another_shape, r"X_train is \(9, 4, 32, 32\) and Y_train .*; both should be"),
        (no_members, r"dataset\.npz: cannot be read, or lacks X_train or Y_train"),
        (text, r"BJ13.*no TaxiBJ file that can be read"),
        (no_dates, r"BJ13.*no TaxiBJ file that can be read"),
        (odd_dates, "has a half hour 49"),
        (few_dates, r"data is \(9, 2, 32, 32\) for 8 dates"),
        (no_flow, "all flows before .* are 0"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        walk(TaxiBjSource(path=tmp_path, test_days=0))
    assert "\n" not in str(caught.value)


def test_a_test_as_long_as_the_files_is_said_to_leave_no_training(originals):
    with pytest.raises(UsageError, match=r"source\.test_days 28 leaves nothing to train on: 3 days are there"):
        walk(TaxiBjSource(path=originals[0]))


def test_sequences_that_are_not_numbers_are_left_out(dataset):
    folder, arrays = dataset
    arrays["Y_train"][3, 0, 0, 0, 0] = np.nan
    np.savez(folder / "dataset.npz", **arrays)
    config = TaxiBjSource(path=folder)
    samples = walk(config)
    read(config, samples[2])
    with pytest.raises(DecodeError, match="infinite or not a number"):
        read(config, samples[3])
