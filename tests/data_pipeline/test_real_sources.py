"""Published data sets in their published layouts, as far as a few real files of each go. Needs STPREDICT_TEST_DATA."""

import json
import tarfile

import numpy as np
import pytest

from data_pipeline.config import ArraysSource, KineticsSource, KthSource, MovingDigitsSource, Ucf101Source
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
