"""The configs of data sets of fields, on small files in their layouts."""

import io
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from data_pipeline.arrays import cut_array
from data_pipeline.config import ClipConfig
from data_pipeline.sources.netcdf_files import kept_open
from data_pipeline.sources.source import describe, read, walk
from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
NAMES = {"2m_temperature": "t2m", "temperature": "t", "relative_humidity": "r"}
NAMES |= {f"{axis}_component_of_wind": axis for axis in "uv"} | {
    f"10m_{axis}_component_of_wind": f"{axis}10" for axis in "uv"
}


A_YEAR_EACH = ["source.train=[2010,2010]", "source.val=[2011,2011]", "source.test=[2012,2012]"]


def source_of(name, *overrides):
    return load(AnyJobConfig, CONFIGS / f"{name}.yaml", overrides).source


@pytest.fixture(scope="module")
def weatherbench(tmp_path_factory):
    """WeatherBench's folders, with files of 2010 to 2018 of one variable and to 2012 of the others, on a grid of
    1 x 2: the first value is the level, the second the hour of all."""
    root = tmp_path_factory.mktemp("weather_5_625deg")
    origin = np.datetime64("2010-01-01T00", "ns")
    for folder, variable in NAMES.items():
        levels = [] if variable in ("t2m", "u10", "v10") else [150, 500, 850, 1000]
        for year in range(2010, 2019 if variable == "t2m" else 2013):
            times = np.arange(f"{year}-01-01T00", f"{year + 1}-01-01T00", dtype="datetime64[h]").astype(
                "datetime64[ns]"
            )
            values = np.zeros((len(times), len(levels) or 1, 1, 2), np.float32)
            values[..., 0, 0] = levels or [2]
            values[..., 0, 1] = ((times - origin) / np.timedelta64(1, "h"))[:, None]
            axes = {"time": times, "level": levels, "lat": [2.8125], "lon": [0.0, 5.625]}
            array = xr.DataArray(
                values if levels else values[:, 0],
                {n: axes[n] for n in axes if levels or n != "level"},
                name=variable,
                dims=[n for n in axes if levels or n != "level"],
            )
            (root / folder).mkdir(exist_ok=True)
            array.to_netcdf(root / folder / f"{folder}_{year}_5.625deg.nc", engine="h5netcdf")
    yield root
    kept_open.cache_clear()


def counts(samples):
    return [sum(sample.split == split for sample in samples) for split in ("train", "val", "test")]


def hours_of(config, sample):
    return np.load(io.BytesIO(read(config, sample)[1]))[:, 0, 1, 0]


def test_weatherbench_s_has_every_window_of_24_hours_in_its_years(weatherbench):
    config = source_of("weatherbench", f"source.path={weatherbench}/2m_temperature")
    samples = walk(config)
    assert counts(samples) == [2191 * 24 - 23, 366 * 24 - 23, 730 * 24 - 23]
    for sample in samples[:: len(samples) // 5]:
        first = (np.datetime64(sample.metadata["time"]) - np.datetime64("2010-01-01")) / np.timedelta64(1, "h")
        assert hours_of(config, sample).tolist() == [first + hour for hour in range(24)]


@pytest.mark.parametrize(
    ("path", "overrides", "channels"),
    [
        ("relative_humidity", ["source.variables=[r]", "source.levels=[1000]"], ["r_1000"]),
        ('"{}/10m_{{u,v}}_component_of_wind/*.nc"', ["source.variables=[u10, v10]"], ["u10", "v10"]),
    ],
)
def test_the_other_variables_of_weatherbench_s_are_found_as_its_config_says(weatherbench, path, overrides, channels):
    path = path.format(weatherbench) if "{}" in path else f"{weatherbench}/{path}"
    config = source_of("weatherbench", f"source.path={path}", *overrides, *A_YEAR_EACH)
    samples = walk(config)
    assert counts(samples) == [365 * 24 - 23, 365 * 24 - 23, 366 * 24 - 23]
    assert describe(config, samples).channels == channels


@pytest.mark.parametrize(
    ("offsets", "leads", "span"),
    [([], [6, 42, 78, 114], 217), (["source.offsets=[-18,-12,-6,0,6,12,18,24]"], [6, 12, 18, 24], 43)],
)
def test_weatherbench_m_predicts_the_published_leads_or_six_hourly_ones(weatherbench, offsets, leads, span):
    config = source_of("weatherbench_m", f"source.path={weatherbench}", *A_YEAR_EACH, *offsets)
    samples = walk(config)
    assert counts(samples) == [(days * 24 - span) // 6 + 1 for days in (365, 365, 366)]
    variables, levels = "rtuv", (150, 500, 850)
    assert describe(config, samples).channels == [f"{variable}_{level}" for variable in variables for level in levels]
    for sample in samples[:: len(samples) // 5]:
        array = np.load(io.BytesIO(read(config, sample)[1]))
        assert array.shape == (8, 1, 2, 12)
        assert array[0, 0, 0].tolist() == [*levels] * 4
        hours = array[:, 0, 1, 0]
        assert (hours[4:] - hours[3]).tolist() == leads
        assert hours[0] % 6 == 0


def test_long_sequences_that_overlap_give_every_window_once(weatherbench):
    """What weatherbench.yaml says of source.sequence=240 and every=217, with clips of 24 hours."""
    of_a_month = ["source.train=[2010-01,2010-01]", "source.val=[2010-02,2010-02]", "source.test=[2010-03,2010-03]"]
    path = f"source.path={weatherbench}/2m_temperature/*_2010_*.nc"
    short = source_of("weatherbench", path, *of_a_month)
    windows = [hours_of(short, sample)[0] for sample in walk(short)[: 3 * 217]]
    long = source_of("weatherbench", path, *of_a_month, "source.sequence=240", "source.every=217")
    clip, starts = ClipConfig(frames=24, size=(1, 2), per_video=217, start="first"), []
    for sample in walk(long)[:3]:
        array = np.load(io.BytesIO(read(long, sample)[1]))
        clips = [cut_array(array, clip, np.random.default_rng(0), (part, 217)) for part in range(217)]
        starts += [clip[0, 0, 1, 0] for clip in clips]
    assert starts == windows


def test_nyc_traffic_slides_over_its_days_and_no_half_hour_is_in_two_splits(test_data):
    path = test_data / "traffic_nyc" / "taxi_volume_test.npz"
    config = source_of("nyc_traffic", f"source.path={path}")
    volume = np.load(path)["volume"]
    samples = walk(config)
    assert counts(samples) == [672 - 7, 96 - 7, 192 - 7]
    steps = {
        split: {step for s in samples if s.split == split for step in range(*s.metadata["steps"])}
        for split in ("train", "val", "test")
    }
    assert [sorted(steps[split]) for split in steps] == [[*range(672)], [*range(672, 768)], [*range(768, 960)]]
    for sample in samples[::97]:
        first, end = sample.metadata["steps"]
        np.testing.assert_array_equal(
            np.load(io.BytesIO(read(config, sample)[1])), volume[first:end].astype(np.float32)
        )
    described = describe(config, samples)
    assert (described.channels, described.units) == (["inflow", "outflow"], ["trips", "trips"])


def test_era5_takes_every_hour_of_the_days_of_each_split(test_data):
    path = test_data / "era5" / "derived_2m_temperature_UK_2019-03_hourly.nc"
    samples = walk(source_of("era5", f"source.path={path}"))
    assert counts(samples) == [22 * 24 - 23, 4 * 24 - 23, 5 * 24 - 23]


def test_moving_mnist_as_arrays_has_twenty_frames(test_data):
    config = source_of(
        "moving_mnist_arrays", f"source.mnist={test_data}/mnist/raw", "source.videos=2", "source.validation_videos=1"
    )
    for sample in walk(config):
        array = np.load(io.BytesIO(read(config, sample)[1]))
        assert (array.shape, array.dtype) == ((20, 64, 64, 1), np.uint8)
