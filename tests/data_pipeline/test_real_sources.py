"""Published data sets in their published layouts, as far as a few real files of each go. Needs STPREDICT_TEST_DATA."""

import io
import json
import tarfile

import h5py
import numpy as np
import pytest
from scipy.io import netcdf_file

from data_pipeline.config import (
    ArraysSource,
    KineticsSource,
    KthSource,
    MovingDigitsSource,
    NetcdfSource,
    Ucf101Source,
)
from data_pipeline.errors import UsageError
from data_pipeline.manifest import merge
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.source import describe, walk
from data_pipeline.verify import verify


def written(source, folder):
    """Both splits of a source as shards that verify, and what every KEY.json says, by name."""
    samples, manifests, about = walk(source), {}, {}
    description = describe(source, samples)
    for split in sorted({sample.split for sample in samples}):
        of_split = [sample for sample in samples if sample.split == split]
        plans = plan_shards(source, of_split, description, shards=1, window_bytes=2**24, seed=0)
        write_shards(folder / split, plans, workers=2)
        manifests[split] = merge(folder / split)
        assert verify(folder / split) == []
        with tarfile.open(folder / split / "shard-000000.tar") as tar:
            texts = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")]
        about |= {says["name"]: says for says in map(json.loads, texts)}
    return manifests, about


@pytest.fixture
def ucf101(test_data, tmp_path):
    """Two classes of UCF-101 with lists of fold 1 in the published form: groups 1 to 7 are for testing."""
    root, classes = tmp_path / "UCF-101", {"ApplyEyeMakeup": 1, "SoccerJuggling": 84}
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = []
    for name in classes:
        (root / name).symlink_to(test_data / "ucf101" / name)
        names += sorted(f"{name}/{path.name}" for path in (root / name).glob("*.avi"))
    testing = [name for name in names if int(name.split("_g")[1][:2]) <= 7]
    training = [f"{name} {classes[name.split('/')[0]]}" for name in names if name not in testing]
    (lists / "testlist01.txt").write_text("".join(f"{line}\r\n" for line in testing))
    (lists / "trainlist01.txt").write_text("".join(f"{line}\r\n" for line in training))
    return root


def test_ucf101(ucf101, tmp_path):
    manifests, about = written(Ucf101Source(path=ucf101), tmp_path / "out")
    assert {split: manifest.samples for split, manifest in manifests.items()} == {"train": 2, "val": 5}
    says = about["SoccerJuggling/v_SoccerJuggling_g23_c01.avi"]
    assert (says["label"], says["class"], says["height"], says["width"]) == ("SoccerJuggling", 1, 240, 320)


def test_kinetics(test_data, tmp_path):
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "flipping pancake,flipping_a_pancake,0,10,train\narm wrestling,gone0000000,1,11,train\n"
    )
    (tmp_path / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nplaying cello,R6llTwEh07w,3,13,validate\n"
    )
    manifests, about = written(KineticsSource(path=test_data / "kinetics", annotations=tmp_path), tmp_path / "out")
    assert manifests["train"].classes == ["arm wrestling", "flipping pancake", "playing cello"]
    assert (about["R6llTwEh07w.mp4"]["class"], about["R6llTwEh07w.mp4"]["time_end"]) == (2, 13)


def test_kth(test_data, tmp_path):
    manifests, about = written(KthSource(path=test_data / "kth"), tmp_path / "out")
    (says,) = about.values()
    assert list(manifests) == ["train"]
    assert (says["person"], says["scenario"], says["label"]) == (1, "outdoors", "boxing")
    assert (says["frames"], says["height"], says["width"], says["fps"]) == (360, 120, 160, 25.0)


def test_traffic_fields(test_data, tmp_path):
    path = test_data / "traffic_nyc" / "bike_volume_test.npz"
    source = ArraysSource(path=path, sequence=48, channels=("inflow", "outflow"), units=("trips", "trips"))
    manifests, about = written(source, tmp_path / "out")
    volume = np.load(path)["volume"].astype(np.float32).astype(np.float64)
    train = manifests["train"]
    assert (train.samples, manifests["val"].samples, train.units) == (18, 2, ["trips", "trips"])
    np.testing.assert_allclose(train.moments.mean, volume[: 18 * 48].mean((0, 1, 2)), rtol=1e-12)
    deviation = np.sqrt(np.array(train.moments.m2) / train.moments.count)
    np.testing.assert_allclose(deviation, volume[: 18 * 48].std((0, 1, 2)), rtol=1e-9)
    assert about["bike_volume_test.npz/000912"]["steps"] == [912, 960]


def arrays_of(folder):
    """The arrays of a set of one shard, by the names of the samples."""
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    names = {key[:-5]: json.loads(text)["name"] for key, text in members.items() if key.endswith(".json")}
    return {name: np.load(io.BytesIO(members[f"{key}.npy"])) for key, name in names.items()}


def test_hourly_temperatures_in_netcdf_4(test_data, tmp_path):
    path = test_data / "era5" / "derived_2m_temperature_UK_2019-03_hourly.nc"
    ranges = {
        "train": ("2019-03-01", "2019-03-22"),
        "val": ("2019-03-23", "2019-03-26"),
        "test": ("2019-03-27", "2019"),
    }
    source = NetcdfSource(path=path, variables=("t2m",), sequence=24, every=12, **ranges)
    manifests, about = written(source, tmp_path / "out")
    with h5py.File(path) as file:
        stored, latitudes = file["t2m"][:], file["lat"][:]
    assert {split: manifest.samples for split, manifest in manifests.items()} == {"train": 43, "val": 7, "test": 9}
    train = manifests["train"]
    assert (train.channels, train.units, train.latitudes) == (["t2m"], ["K"], latitudes.tolist())
    values = []
    for split, first in (("train", 0), ("val", 22 * 24), ("test", 26 * 24)):
        arrays = arrays_of(tmp_path / "out" / split)
        for number, name in enumerate(sorted(arrays)):
            start = first + 12 * number
            np.testing.assert_array_equal(arrays[name][..., 0], stored[start : start + 24])
            time = str(np.datetime64("2019-03-01T00:00:00") + np.timedelta64(start, "h"))
            assert (about[name]["time"], about[name]["interval_h"]) == (time, 1.0)
            values += [stored[start : start + 24]] if split == "train" else []
    np.testing.assert_allclose(train.moments.mean, [np.mean(values, dtype=np.float64)], rtol=1e-12)
    deviation = np.sqrt(train.moments.m2[0] / train.moments.count)
    np.testing.assert_allclose(deviation, np.std(values, dtype=np.float64), rtol=1e-9)


def test_winds_on_levels_in_netcdf_3(test_data, tmp_path):
    path = test_data / "era5" / "eraint_uvz.nc"
    source = NetcdfSource(path=path, variables=("v", "u"), levels=(850, 200), sequence=1, axes={"time": "month"})
    manifests, _ = written(source, tmp_path / "out")
    assert manifests["train"].channels == ["v_850", "v_200", "u_850", "u_200"]
    with netcdf_file(path, mmap=False) as file:
        packed = {name: file.variables[name] for name in "uv"}
        fields = {name: v.data * v.scale_factor + v.add_offset for name, v in packed.items()}
        levels, latitudes = file.variables["level"].data.tolist(), file.variables["latitude"].data.tolist()
    expected = [fields[name][:, levels.index(level)] for name in "vu" for level in (850, 200)]
    for split, month in (("train", 0), ("val", 1)):
        (array,) = arrays_of(tmp_path / "out" / split).values()
        np.testing.assert_allclose(array[0], np.stack(expected, axis=-1)[month], rtol=1e-6, atol=1e-5)
        assert manifests[split].latitudes == latitudes


def test_sea_surface_temperatures_are_missing_on_land(test_data, tmp_path):
    path = test_data / "era5" / "ostia_monthly.nc"
    asked = {"path": path, "variables": ("surface_temperature",), "sequence": 12}
    with h5py.File(path) as file:
        stored = file["surface_temperature"][:]
    missing = stored > 1e19  # _FillValue is 1e20
    message = rf"surface_temperature has {missing[0].sum()} missing values at 2006-04-16T00:00:00"
    with pytest.raises(UsageError, match=message):
        walk(NetcdfSource(**asked))
    manifests, about = written(NetcdfSource(**asked, fill=273.0), tmp_path / "out")
    assert {split: manifest.samples for split, manifest in manifests.items()} == {"train": 3, "val": 1}
    arrays = arrays_of(tmp_path / "out" / "train")
    found = np.concatenate([arrays[name] for name in sorted(arrays)])[..., 0]
    np.testing.assert_array_equal(found, np.where(missing, np.float32(273), stored)[:36])
    assert about["2006-04-16T00:00:00"]["hours"][:2] == [0.0, 30.5 * 24]


def test_robot_episodes(test_data, tmp_path):
    path = test_data / "bridge" / "derived_train_image0.npz"
    manifests, about = written(ArraysSource(path=path, member="image", axes="n t h w c"), tmp_path / "out")
    assert sum(manifest.samples for manifest in manifests.values()) == 25
    assert manifests["train"].dtype == "uint8"
    assert {(says["frames"], says["height"], says["width"]) for says in about.values()} == {(10, 64, 64)}


def test_moving_digits_of_mnist(test_data, tmp_path):
    source = MovingDigitsSource(mnist=test_data / "mnist" / "raw", videos=3, validation_videos=1, frames=4)
    manifests, about = written(source, tmp_path / "out")
    assert (manifests["train"].samples, manifests["val"].samples, len(about)) == (3, 1, 4)
