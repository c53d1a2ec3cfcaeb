import io
import itertools
import json
import os
import tarfile
import tracemalloc

import h5py
import numpy as np
import psutil
import pytest
import xarray as xr
from pydantic import ValidationError
from scipy.io import netcdf_file

from data_pipeline.config import NetcdfSource
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.manifest import Description, merge, read_manifest
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.netcdf_files import Field, kept_open
from data_pipeline.sources.source import describe, read, walk

ROWS, COLUMNS = 3, 4
ORIGIN = np.datetime64("2010-01-01", "h")


def hours(first, end, step=1):
    return (
        np.datetime64(first, "h")
        + np.arange(0, (np.datetime64(end, "h") - np.datetime64(first, "h")).astype(int), step)
    ).astype("datetime64[ns]")


def value(variable, time, level=0):
    """Of the upper left point: different for every variable, hour and level; others differ by their number."""
    hour = (np.asarray(time).astype("datetime64[h]") - ORIGIN).astype(int)
    return {"t2m": 100_000, "t": 200_000, "u": 300_000}[variable] + hour * 16 + level / 1000


def field(variable, times, levels=()):
    """DataArray (time[, level], lat, lon) whose values say what they are."""
    grid = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    stacked = np.stack([value(variable, times, level) for level in levels or [0]], axis=1)[:, :, None, None] + grid
    coordinates = {"time": times, "lat": [60.0, 0.0, -60.0], "lon": [0.0, 90.0, 180.0, 270.0]}
    if not levels:
        return xr.DataArray(stacked[:, 0], coordinates, ["time", "lat", "lon"], variable, {"units": "K"})
    return xr.DataArray(stacked, coordinates | {"level": list(levels)}, ["time", "level", "lat", "lon"], variable)


def write(path, *fields, engine="h5netcdf"):
    path.parent.mkdir(parents=True, exist_ok=True)
    xr.merge(fields).to_netcdf(path, engine=engine)
    return path


def samples_and_arrays(config):
    samples = walk(config)
    return samples, [np.load(io.BytesIO(read(config, sample)[1])) for sample in samples]


@pytest.fixture(autouse=True)
def _forget_open_files():
    yield
    kept_open.cache_clear()


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_netcdf_3_and_4_are_read_alike_and_as_h5py_and_scipy_read_them(tmp_path, engine):
    path = write(tmp_path / "a.nc", field("t2m", hours("2010-01-01", "2010-01-03")), engine=engine)
    config = NetcdfSource(path=path, variables=("t2m",), sequence=6, validation_fraction=0.25)
    samples, arrays = samples_and_arrays(config)
    if engine == "h5netcdf":
        with h5py.File(path) as file:
            stored = file["t2m"][:]
    else:
        with netcdf_file(path, mmap=False) as file:
            stored = file.variables["t2m"].data.copy()
    assert [array.shape for array in arrays] == [(6, ROWS, COLUMNS, 1)] * 8
    assert [sample.split for sample in samples] == ["train"] * 6 + ["val"] * 2
    assert {array.dtype for array in arrays} == {np.dtype("float32")}
    np.testing.assert_array_equal(np.concatenate(arrays)[..., 0], stored.astype(np.float32))


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_packed_numbers_are_scaled_and_their_fill_value_is_missing(tmp_path, engine):
    packed = np.arange(4 * 6, dtype=np.int16).reshape(4, 2, 3)
    packed[2, 1, 1:] = -99
    about = {"scale_factor": 0.5, "add_offset": 250.0, "_FillValue": np.int16(-99), "units": "K"}
    axes = {"time": hours("2010-01-01", "2010-01-01T04"), "lat": [1.0, 0.0], "lon": [0.0, 1.0, 2.0]}
    dataset = xr.Dataset({"t2m": (list(axes), packed, about)}, axes)
    dataset.to_netcdf(path := tmp_path / "a.nc", engine=engine)
    asked = {"path": path, "variables": ("t2m",), "sequence": 1, "validation_fraction": 0}
    samples = walk(NetcdfSource(**asked))
    with pytest.raises(DecodeError, match=r"^t2m has 2 missing values at 2010-01-01T02:00:00; source\.fill puts"):
        read(NetcdfSource(**asked), samples[2])
    _, arrays = samples_and_arrays(NetcdfSource(**asked, fill=-1))
    expected = np.where(packed == -99, -1, packed * 0.5 + 250)
    np.testing.assert_array_equal(np.concatenate(arrays)[..., 0], expected)


def test_levels_are_channels_and_surface_fields_stand_beside_them(tmp_path):
    times = hours("2010-01-01", "2010-01-01T08")
    path = write(tmp_path / "a.nc", field("t", times, (1000, 850, 500, 150)), field("t2m", times))
    config = NetcdfSource(path=path, variables=("t", "t2m"), levels=(150, 850), sequence=4, units={"t": "degC"})
    samples, arrays = samples_and_arrays(config)
    about = describe(config, samples)
    assert (about.channels, about.units) == (["t_150", "t_850", "t2m"], ["degC", "degC", "K"])
    assert (about.dtype, about.latitudes) == ("float32", [60.0, 0.0, -60.0])
    corners = np.concatenate(arrays)[:, 0, 0]
    expected = [value("t", times, 150), value("t", times, 850), value("t2m", times)]
    np.testing.assert_array_equal(corners, np.stack(expected, axis=-1).astype(np.float32))


@pytest.fixture
def weatherbench(tmp_path):
    """Two years, of which four days each, of three variables: a folder per variable, a file per year."""
    for year in (2010, 2011):
        times = hours(f"{year}-01-01", f"{year}-01-05") if year == 2011 else hours("2010-12-28", "2011-01-01")
        write(tmp_path / f"2m_temperature/2m_temperature_{year}_5.625deg.nc", field("t2m", times))
        for variable, folder in (("t", "temperature"), ("u", "u_component_of_wind")):
            levels = (150, 500, 850)
            write(tmp_path / f"{folder}/{folder}_{year}_5.625deg.nc", field(variable, times, levels))
    return tmp_path


def test_a_folder_per_variable_and_a_file_per_year_is_one_line_of_time(weatherbench):
    config = NetcdfSource(
        path=weatherbench, variables=("t2m", "u"), levels=(500,), sequence=24, every=8, validation_fraction=0
    )
    samples, arrays = samples_and_arrays(config)
    assert len(samples) == (192 - 24) // 8 + 1
    assert any(len(sample.item["u"]) == 2 for sample in samples)  # from two files
    for number, (sample, array) in enumerate(zip(samples, arrays, strict=True)):
        times = hours("2010-12-28", "2011-01-05")[8 * number : 8 * number + 24]
        assert (sample.metadata["time"], sample.metadata["interval_h"]) == (str(times[0])[:19], 1.0)
        expected = np.stack([value("t2m", times), value("u", times, 500)], axis=-1)
        np.testing.assert_array_equal(array[:, 0, 0], expected.astype(np.float32))


def test_files_follow_each_other_by_their_times_whatever_their_names(tmp_path):
    for name, day in (("jan_a", 2), ("jan_b", 1)):
        write(tmp_path / f"{name}.nc", field("t2m", hours(f"2010-01-0{day}", f"2010-01-0{day + 1}")))
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=12, validation_fraction=0)
    samples, arrays = samples_and_arrays(config)
    assert [sample.metadata["time"][8:13] for sample in samples] == ["01T00", "01T12", "02T00", "02T12"]
    corners = np.concatenate(arrays)[:, 0, 0, 0]
    np.testing.assert_array_equal(corners, value("t2m", hours("2010-01-01", "2010-01-03")).astype(np.float32))


def test_patterns_choose_files_and_one_folder_of_several(weatherbench):
    some = {"variables": ("t2m",), "sequence": 24, "validation_fraction": 0}
    assert len(walk(NetcdfSource(path=weatherbench / "2m_temperature" / "*.nc", **some))) == 8
    assert len(walk(NetcdfSource(path=weatherbench / "2m_temperature" / "*_2011_*.nc", **some))) == 4
    braces = NetcdfSource(
        path=weatherbench / "{2m_temperature,temperature}" / "*.nc", **some | {"variables": ("t2m", "t")}, levels=(500,)
    )
    assert len(walk(braces)) == 8


@pytest.mark.parametrize(
    ("cut", "leads"),
    [
        # Leads in hours after the last input frame, of WeatherBench's four frames to four.
        ({"offsets": tuple(6 * o for o in (-5, -3, -1, 0, 1, 2, 3, 7)), "every": 6}, [-30, -18, -6, 0, 6, 12, 18, 42]),
        ({"offsets": tuple(range(0, 48, 6)), "every": 6}, [-18, -12, -6, 0, 6, 12, 18, 24]),
    ],
)
def test_frames_that_are_not_evenly_apart_are_those_at_the_offsets(weatherbench, cut, leads):
    config = NetcdfSource(path=weatherbench / "2m_temperature", variables=("t2m",), **cut, validation_fraction=0)
    samples, arrays = samples_and_arrays(config)
    span = leads[-1] - leads[0] + 1
    assert len(samples) == (192 - span) // 6 + 1
    for number, (sample, array) in enumerate(zip(samples, arrays, strict=True)):
        last_input = hours("2010-12-28", "2011-01-05")[6 * number - leads[0]]
        times = last_input + np.array(leads) * np.timedelta64(1, "h")
        np.testing.assert_array_equal(array[:, 0, 0, 0], value("t2m", times).astype(np.float32))
        assert sample.metadata["time"] == str(times[0])[:19]
        even = len(set(np.diff(leads))) == 1
        assert sample.metadata.get("interval_h") == (6.0 if even else None)
        assert sample.metadata.get("hours") == (None if even else [float(lead - leads[0]) for lead in leads])


RANGES = {"train": ("2010", "2010"), "val": ("2011-01-01", "2011-01-01T11"), "test": ("2011-01-02", "2011-01")}


def test_ranges_hold_the_times_that_xarray_selects_with_both_ends(weatherbench):
    path = weatherbench / "2m_temperature"
    whole = xr.concat([xr.open_dataarray(file) for file in sorted(path.iterdir())], "time")
    samples = walk(NetcdfSource(path=path, variables=("t2m",), sequence=1, **RANGES))
    for split, (first, last) in RANGES.items():
        selected = whole.sel(time=slice(first, last)).time.values
        assert [s.metadata["time"] for s in samples if s.split == split] == [str(time)[:19] for time in selected]


@pytest.mark.parametrize("every", [1, 5, None])
@pytest.mark.parametrize("splits", [RANGES, {"validation_fraction": 0.2, "test_fraction": 0.3}])
def test_no_time_of_a_sample_is_in_two_splits(weatherbench, splits, every):
    samples = walk(NetcdfSource(path=weatherbench, variables=("t2m",), sequence=6, every=every, **splits))
    times = {"train": [], "val": [], "test": []}
    for sample in samples:
        times[sample.split] += list(np.datetime64(sample.metadata["time"]) + np.arange(6) * np.timedelta64(1, "h"))
    assert all(times.values())
    assert max(times["train"]) < min(times["val"])
    assert max(times["val"]) < min(times["test"])
    if every == 1:  # nothing but what would reach into the next split is left out
        assert len(samples) == len(set(times["train"])) + len(set(times["val"])) + len(set(times["test"])) - 3 * 5


def test_no_sample_reaches_over_a_gap_and_months_are_no_gaps(tmp_path, caplog):
    times = np.delete(hours("2010-01-01", "2010-01-02"), [10, 11])
    write(tmp_path / "a.nc", field("t2m", times))
    samples = walk(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4, every=1, validation_fraction=0))
    starts = [int(sample.metadata["time"][11:13]) for sample in samples]
    assert starts == [*range(7), *range(12, 21)]
    assert "3 samples that reach over gaps in time are left out" in caplog.text
    months = np.array([f"2010-{month:02}-15" for month in range(4, 8)], "datetime64[ns]")
    write(tmp_path / "monthly" / "a.nc", field("t2m", months))
    samples = walk(NetcdfSource(path=tmp_path / "monthly", variables=("t2m",), sequence=4, validation_fraction=0))
    assert len(samples) == 1
    assert samples[0].metadata["hours"] == [0, 30 * 24, 61 * 24, 91 * 24]


def test_of_variables_with_different_times_those_in_common_are_taken(tmp_path, caplog):
    write(tmp_path / "t.nc", field("t2m", hours("2010-01-01", "2010-01-02")))
    write(tmp_path / "u.nc", field("u", hours("2010-01-01T07", "2010-01-02T07"), (500,)))
    config = NetcdfSource(path=tmp_path, variables=("u", "t2m"), sequence=17, validation_fraction=0)
    (sample,), (array,) = samples_and_arrays(config)
    assert sample.metadata["time"] == "2010-01-01T07:00:00"
    times = hours("2010-01-01T07", "2010-01-02")
    expected = np.stack([value("u", times, 500), value("t2m", times)], axis=-1)
    np.testing.assert_array_equal(array[:, 0, 0], expected.astype(np.float32))
    assert "7 times that not all variables have are left out" in caplog.text
    assert describe(config, [sample]).channels == ["u", "t2m"]  # of one level, of which nothing was asked


@pytest.mark.parametrize("order", list(itertools.permutations(["time", "lat", "lon"])))
def test_axes_may_stand_in_any_order(tmp_path, order):
    times = hours("2010-01-01", "2010-01-01T05")
    write(tmp_path / "a.nc", field("t2m", times).transpose(*order))
    _, (array,) = samples_and_arrays(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=5))
    np.testing.assert_array_equal(array[..., 0], field("t2m", times).values.astype(np.float32))


@pytest.mark.parametrize(
    ("names", "given", "degrees"),
    [
        ({"time": "valid_time", "lat": "latitude", "lon": "longitude"}, {}, True),
        (
            {"time": "when", "lat": "north", "lon": "east"},
            {"time": "when", "latitude": "north", "longitude": "east"},
            False,
        ),
        ({"lat": "y", "lon": "x"}, {}, False),
    ],
)
def test_axes_are_known_by_usual_or_given_names_and_only_degrees_are_latitudes(tmp_path, names, given, degrees):
    times = hours("2010-01-01", "2010-01-01T05")
    write(tmp_path / "a.nc", field("t2m", times).rename(names))
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=5, axes=given)
    samples, (array,) = samples_and_arrays(config)
    np.testing.assert_array_equal(array[..., 0], field("t2m", times).values.astype(np.float32))
    assert describe(config, samples).latitudes == ([60.0, 0.0, -60.0] if degrees else None)


def test_axes_are_known_by_the_marks_of_the_cf_conventions(tmp_path):
    marked = field("t2m", hours("2010-01-01", "2010-01-01T05")).rename(time="when", lat="north", lon="east")
    marked["when"].attrs["axis"], marked["east"].attrs["axis"] = "T", "X"
    marked["north"].attrs |= {"standard_name": "latitude", "units": "degrees_north"}
    write(tmp_path / "a.nc", marked.expand_dims(number=[0]))  # one member of an ensemble
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=5)
    samples, (array,) = samples_and_arrays(config)
    assert array.shape == (5, ROWS, COLUMNS, 1)
    assert describe(config, samples).latitudes == [60.0, 0.0, -60.0]


def test_shards_hold_the_samples_with_their_times_and_numpys_statistics(weatherbench, tmp_path):
    config = NetcdfSource(path=weatherbench, variables=("t2m", "t"), levels=(500, 850), sequence=12, every=6, **RANGES)
    samples = walk(config)
    training = [sample for sample in samples if sample.split == "train"]
    plans = plan_shards(config, training, describe(config, samples), shards=2, window_bytes=2**20, seed=0)
    write_shards(tmp_path / "out", plans)
    manifest = merge(tmp_path / "out")
    assert (manifest.channels, manifest.units) == (["t2m", "t_500", "t_850"], ["K", "", ""])
    assert read_manifest(tmp_path / "out").latitudes == [60.0, 0.0, -60.0]
    found, starts = [], []
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "out" / f"{shard.name}.tar") as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name in members:
            if name.endswith(".npy"):
                about = json.loads(members[f"{name[:-4]}.json"])
                array = np.load(io.BytesIO(members[name]))
                times = np.datetime64(about["time"]) + np.arange(12) * np.timedelta64(1, "h")
                np.testing.assert_array_equal(array[:, 0, 0, 0], value("t2m", times).astype(np.float32))
                np.testing.assert_array_equal(array[:, 0, 0, 2], value("t", times, 850).astype(np.float32))
                assert (about["interval_h"], about["frames"], about["source"]) == (1.0, 12, "netcdf")
                found.append(array)
                starts.append(about["time"])
    assert sorted(starts) == [sample.metadata["time"] for sample in training]
    stored = np.stack(found).astype(np.float64)
    np.testing.assert_allclose(manifest.moments.mean, stored.mean((0, 1, 2, 3)), rtol=1e-12)
    deviations = np.sqrt(np.array(manifest.moments.m2) / manifest.moments.count)
    np.testing.assert_allclose(deviations, stored.std((0, 1, 2, 3)), rtol=1e-9)


def test_a_shard_is_planned_anew_where_any_of_its_files_has_changed(weatherbench):
    config = NetcdfSource(path=weatherbench, variables=("t2m", "u"), levels=(500,), sequence=24, validation_fraction=0)

    def plans():
        samples = walk(config)
        split = plan_shards(config, samples, describe(config, samples), shards=8, window_bytes=2**20, seed=0)
        return {plan.samples[0].name: plan.hash for plan in split}

    before = plans()
    assert plans() == before
    os.utime(weatherbench / "u_component_of_wind" / "u_component_of_wind_2011_5.625deg.nc", (1, 1))
    after = plans()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name in before if name >= "2011"}


def test_manifests_without_latitudes_are_what_they_were():
    assert "latitudes" not in Description(kind="clips").model_dump(mode="json")
    assert '"latitudes"' not in Description(kind="clips").model_dump_json()


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_of_a_long_recording_only_the_sample_is_read(tmp_path, engine):
    times = hours("2010-01-01", "2010-12-27")
    values = np.zeros((len(times), 32, 32), np.float32)  # 35 MB
    axes = {"time": times, "lat": np.arange(32.0), "lon": np.arange(32.0)}
    xr.Dataset({"t2m": (list(axes), values)}, axes).to_netcdf(tmp_path / "a.nc", engine=engine)
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=24)
    del values
    tracemalloc.start()
    samples = walk(config)
    read(config, samples[200])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_a_file_that_was_damaged_after_the_walk_costs_its_samples_alone(weatherbench):
    config = NetcdfSource(path=weatherbench, variables=("t2m",), sequence=24, validation_fraction=0)
    samples = walk(config)
    kept_open.cache_clear()
    file = weatherbench / "2m_temperature" / "2m_temperature_2011_5.625deg.nc"
    file.write_bytes(file.read_bytes()[:3000])
    read(config, samples[0])
    with pytest.raises(DecodeError, match="cannot be read: ") as caught:
        read(config, samples[-1])
    assert "\n" not in str(caught.value)


def test_missing_values_in_the_first_frame_are_refused_before_anything_is_written(tmp_path):
    times = hours("2010-01-01", "2010-01-02")
    land = field("t2m", times)
    land[:, 1, :3] = np.nan
    write(tmp_path / "a.nc", land)
    with pytest.raises(UsageError, match=r"a\.nc: t2m has 3 missing values at 2010-01-01T00:00:00; source\.fill"):
        walk(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4))
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4, fill=0)
    assert (samples_and_arrays(config)[1][0][:, 1, :3] == 0).all()


def test_what_was_never_written_is_missing_although_no_fill_value_is_named(tmp_path):
    array = field("t2m", hours("2010-01-01", "2010-01-01T08")).astype(np.float32)
    array[6, 1, 2] = np.float32(9.969209968386869e36)  # NC_FILL_FLOAT
    array.encoding["_FillValue"] = None
    write(tmp_path / "a.nc", array)
    asked = {"path": tmp_path, "variables": ("t2m",), "sequence": 4, "validation_fraction": 0}
    samples = walk(NetcdfSource(**asked))
    with pytest.raises(DecodeError, match="t2m has 1 missing values at 2010-01-01T06:00:00"):
        read(NetcdfSource(**asked), samples[1])
    assert samples_and_arrays(NetcdfSource(**asked, fill=0))[1][1][2, 1, 2, 0] == 0


def infinite(folder):
    array = field("t2m", hours("2010-01-01", "2010-01-02"))
    array[0, 0, 0] = 1e300
    write(folder / "a.nc", array)


def overlapping(folder):
    for name, day in (("a", "01"), ("b", "02")):
        write(folder / f"{name}.nc", field("t2m", hours(f"2010-01-{day}", "2010-01-04")))


def another_grid(folder):
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")))
    write(folder / "b.nc", field("t2m", hours("2010-01-02", "2010-01-03")).isel(lat=slice(2)))


def another_unit(folder):
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")))
    write(folder / "b.nc", field("t2m", hours("2010-01-02", "2010-01-03")).assign_attrs(units="degC"))


def levels(folder):
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02"), (500, 850)))


def members(folder):
    array = field("t2m", hours("2010-01-01", "2010-01-02"))
    write(folder / "a.nc", xr.concat([array, array], "number"))


def text(folder):
    (folder / "a.nc").write_text("no field")


def whole(folder):
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")))


def numbered(folder):
    array = field("t2m", hours("2010-01-01", "2010-01-02"))
    write(folder / "a.nc", array.assign_coords(time=np.arange(24)))


def other_places(folder):
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")))
    moved = field("t2m", hours("2010-01-02", "2010-01-03")).assign_coords(lon=[-180.0, -90.0, 0.0, 90.0])
    write(folder / "b.nc", moved)


def counted(folder, **about):
    array = field("t2m", hours("2010-01-01", "2010-01-02"))
    write(folder / "a.nc", array.assign_coords(time=("time", np.arange(24), about)))


def without_leap_days(folder):
    counted(folder, units="hours since 2010-01-01", calendar="noleap")


def in_months(folder):
    counted(folder, units="months since 2010-01-01")


def no_steps(folder):
    whole(folder)
    write(folder / "b.nc", field("t2m", hours("2010-01-02", "2010-01-03"))[:0])


def a_time_missing(folder):
    times = hours("2010-01-01", "2010-01-02")
    times[5] = np.datetime64("NaT")
    write(folder / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")).assign_coords(time=times))


def half_dated(folder):
    whole(folder)
    write(folder / "u.nc", field("u", hours("2010-01-01", "2010-01-02")).assign_coords(time=np.arange(24)))


def empty(folder):
    folder.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (empty, {}, r"no netCDF file \(\.nc\) there"),
        (text, {}, r"a\.nc: is no netCDF file of version 3 or 4"),
        (whole, {"variables": ("t",)}, r"no variable t there; source\.variables can be of t2m"),
        (whole, {"levels": (500,)}, r"no variable has levels; leave out source\.levels"),
        (levels, {}, r"t2m has the levels 500, 850: source\.levels says which are wanted"),
        (levels, {"levels": (200,)}, "t2m has no level 200, but 500, 850"),
        (members, {}, "t2m has an axis number of 2"),
        (another_grid, {}, r"b\.nc: its grid of 2x4 is not that of .*a\.nc, 3x4"),
        (other_places, {}, r"b\.nc: its grid .* or has other latitudes or longitudes"),
        (without_leap_days, {}, r"a\.nc: unable to decode .*'noleap'\"; times must .* convert_calendar"),
        (in_months, {}, r"a\.nc: unable to decode time units 'months since .*; times must count days or hours"),
        (no_steps, {}, r"b\.nc: t2m has no steps in it; leave the file out"),
        (a_time_missing, {}, r"a\.nc: step 5 has no time"),
        (half_dated, {"variables": ("t2m", "u")}, "u has no times, other variables have"),
        (another_unit, {}, r"b\.nc: t2m is in 'degC', in .*a\.nc in 'K'.*source\.units"),
        (overlapping, {}, r"t2m has 2010-01-02T00:00:00 \(b\.nc\) behind 2010-01-03T23:00:00 \(a\.nc\)"),
        (infinite, {}, "a.nc: t2m has values that are infinite or beyond float32"),
        (whole, {"axes": {"time": "hour"}}, "t2m has no axis hour, but time, lat, lon"),
        (whole, {"sequence": 25}, "24 steps; a sample spans 25"),
        (
            whole,
            {"train": ("2010-02", "2010-03")},
            r"source\.train \['2010-02', '2010-03'\] has 0 steps; .* have 2010-01-01T00",
        ),
        (whole, {"train": ("2010-01", "2010"), "test": ("2010", "2010")}, "overlap"),
        (whole, {"train": ("2011", "2010")}, "ends before it begins"),
        (whole, {"train": ("2010-02-30", "2010")}, r"source\.train .*: Day out of range"),
        (numbered, {"train": ("2010", "2010")}, r"has no dates to find source\.train by"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path, make, changes, message):
    make(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        walk(NetcdfSource(**{"path": tmp_path, "variables": ("t2m",), "sequence": 4, **changes}))
    assert "\n" not in str(caught.value)


def test_times_as_objects_are_of_another_calendar_and_not_taken_for_none(tmp_path):
    """As xarray gives them where cftime is installed."""
    array = field("t2m", hours("2010-01-01", "2010-01-02")).assign_coords(time=np.array([object()] * 24))
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4)
    with pytest.raises(UsageError, match="its time is of another calendar; times must"):
        Field(config, tmp_path, array.to_dataset(), "t2m").times  # noqa: B018


def test_places_of_which_one_file_has_fewer_digits_are_the_same(tmp_path):
    for name, day, kind in (("a", 1, np.float32), ("b", 2, np.float64)):
        array = field("t2m", hours(f"2010-01-0{day}", f"2010-01-0{day + 1}"))
        write(tmp_path / f"{name}.nc", array.assign_coords(lat=np.array([51.7, 0.1, -51.7], kind)))
    assert len(walk(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4))) == 12


def test_axes_without_a_usual_name_are_asked_for(tmp_path):
    write(tmp_path / "a.nc", field("t2m", hours("2010-01-01", "2010-01-02")).rename(lat="north"))
    with pytest.raises(
        UsageError, match=r"which axis of t2m \(time, north, lon\) is its latitude\? source\.axes\.latitude"
    ):
        walk(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4))


def test_steps_without_dates_are_split_by_their_share(tmp_path):
    numbered(tmp_path)
    samples = walk(NetcdfSource(path=tmp_path, variables=("t2m",), sequence=4, validation_fraction=0.3))
    assert [(s.name, s.split, s.metadata) for s in samples][3:5] == [("000012", "train", {}), ("000016", "val", {})]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": None}, "give sequence, the steps of a sample, or offsets"),
        ({"variables": ("a", "a")}, "names one twice"),
        ({"units": {"b": "K"}}, "units of b, which variables does not name"),
        ({"train": ("spring", "2010")}, "'spring' is no date; write 2010, 2010-01"),
        ({"fill": float("nan")}, "finite number"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        NetcdfSource(**{"path": "a.nc", "variables": ("a",), "sequence": 4, **changes})


def test_years_that_yaml_takes_for_numbers_are_years():
    assert NetcdfSource(path="a", variables=("a",), sequence=4, train=(2010, 2015)).train == ("2010", "2015")


def test_as_many_files_stay_open_as_weatherbench_has_so_that_each_is_opened_once(tmp_path):
    days = [np.datetime64("2010-01-01") + day for day in range(160)]  # M: four variables of 40 years
    for day in days:
        with netcdf_file(tmp_path / f"{day}.nc", "w") as file:
            for axis, values in {"time": np.arange(2), "lat": [1.0, 0.0], "lon": [0.0, 1.0]}.items():
                file.createDimension(axis, 2)
                file.createVariable(axis, "f8", (axis,))[:] = values
            file.variables["time"].units = f"hours since {day}"
            file.createVariable("t2m", "f4", ("time", "lat", "lon"))[:] = (day - days[0]).astype(int)
    config = NetcdfSource(path=tmp_path, variables=("t2m",), sequence=2, validation_fraction=0)
    samples = walk(config)
    kept_open.cache_clear()
    for sample in samples + samples[::-1]:
        read(config, sample)
    assert kept_open.cache_info().misses == len(samples) == 160
    assert len({file.path for file in psutil.Process().open_files()} & {str(sample.path) for sample in samples}) == 160
