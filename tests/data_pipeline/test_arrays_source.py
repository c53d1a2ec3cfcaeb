import errno
import io
import itertools
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from data_pipeline import shards
from data_pipeline.config import ArraysSource
from data_pipeline.errors import DecodeError, UsageError, UserError
from data_pipeline.manifest import merge
from data_pipeline.shards import plan_shards, write_shards
from data_pipeline.sources.source import describe, read, walk

SIZES = {"n": 5, "t": 4, "h": 3, "w": 6, "c": 2}


def numbers(axes: str, dtype="float64") -> np.ndarray:
    shape = [SIZES[axis] for axis in axes.split()]
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def samples_and_arrays(config):
    samples = walk(config)
    return samples, [np.load(io.BytesIO(read(config, sample)[1])) for sample in samples]


@pytest.mark.parametrize("axes", ["t h w c", "n t h w c", "t n h w", "c w h t", "w c n t h", "h w t"])
def test_any_order_of_axes_becomes_t_h_w_c(tmp_path, axes):
    array = numbers(axes)
    np.save(tmp_path / "a.npy", array)
    config = ArraysSource(path=tmp_path / "a.npy", axes=axes, validation_fraction=0)
    _, arrays = samples_and_arrays(config)
    names = axes.split()
    for index, got in enumerate(arrays):
        assert got.shape == (4, 3, 6, 2 if "c" in names else 1)
        assert got.dtype == np.float32
        for place in itertools.product(*map(range, got.shape)):
            where = dict(zip("thwc", place, strict=True)) | {"n": index}
            assert got[place] == array[tuple(where[name] for name in names)]
    assert len(arrays) == (5 if "n" in names else 1)


def test_uint8_stays_and_all_other_numbers_become_float32(tmp_path):
    for stored, kept in [("uint8", "uint8"), ("int16", "float32"), ("bool", "float32"), (">f8", "float32")]:
        path = tmp_path / f"{np.dtype(stored).name}.npy"
        np.save(path, numbers("t h w c", stored))
        config = ArraysSource(path=path)
        samples, (array,) = samples_and_arrays(config)
        assert array.dtype == kept == describe(config, samples).dtype
        np.testing.assert_array_equal(array, numbers("t h w c", stored))
    samples, (array,) = samples_and_arrays(ArraysSource(path=tmp_path / "uint8.npy", dtype="float32"))
    assert array.dtype == np.float32
    with pytest.raises(UsageError, match="int16, which uint8 does not hold"):
        walk(ArraysSource(path=tmp_path / "int16.npy", dtype="uint8"))


def test_members_of_an_npz_are_named_where_there_are_several(tmp_path):
    np.savez_compressed(tmp_path / "one.npz", video=numbers("t h w c"))
    np.savez(tmp_path / "two.npz", video=numbers("t h w c"), action=np.zeros((4, 7)))
    for config in (ArraysSource(path=tmp_path / "one.npz"), ArraysSource(path=tmp_path / "two.npz", member="video")):
        _, (array,) = samples_and_arrays(config)
        np.testing.assert_array_equal(array, numbers("t h w c"))
    for member in (None, "image"):
        with pytest.raises(UsageError, match=r"holds video, action; source\.member must name one of them"):
            walk(ArraysSource(path=tmp_path / "two.npz", member=member))


@pytest.mark.parametrize(("kind", "damage"), [("npy", "cut short"), ("npz", "cut short"), ("npz", "zeros inside")])
def test_of_a_damaged_file_its_samples_alone_are_left_out_by_name(tmp_path, kind, damage):
    folder, shards = tmp_path / "arrays", tmp_path / "shards"
    folder.mkdir()
    frames = np.random.default_rng(0).random((4, 80, 80))
    for name in "abc":
        if kind == "npy":
            np.save(folder / name, frames)
        else:
            np.savez_compressed(folder / name, frames=frames)
    whole = (folder / f"b.{kind}").read_bytes()
    middle = bytearray(whole)
    middle[100_000:100_400] = bytes(400)
    config = ArraysSource(path=folder, axes="t h w", validation_fraction=0)
    samples = walk(config)
    # Damaged after the walk, or so late in the file that its header, all that the walk reads, is sound.
    (folder / f"b.{kind}").write_bytes(whole[:100_000] if damage == "cut short" else middle)
    about = {"shards": 1, "window_bytes": 2**20, "seed": 0}
    write_shards(shards, plan_shards(config, samples, describe(config, samples), **about))
    assert merge(shards).samples == 2
    (skipped,) = json.loads((shards / "shard-000000.json").read_text())["skipped"].items()
    assert skipped[0].startswith("b-")
    assert skipped[1].startswith("its array cannot be read: ")
    assert "\n" not in skipped[1]


def test_files_of_a_folder_or_pattern_are_samples_with_names_of_their_own(tmp_path):
    for name in ("a/x.npy", "b/x.npy", "b/y.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, numbers("t h w"))
    samples = walk(ArraysSource(path=tmp_path, axes="t h w", validation_fraction=0))
    assert [sample.name for sample in samples] == ["a/x.npy", "b/x.npy", "b/y.npy"]
    assert len({sample.key for sample in samples}) == 3
    assert not any("." in sample.key for sample in samples)
    pattern = walk(ArraysSource(path=tmp_path / "*" / "x.npy", axes="t h w", validation_fraction=0))
    assert pattern == samples[:2]


def test_ranges_count_on_over_the_files(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", numbers("n t h w"))
    samples = walk(ArraysSource(path=tmp_path, axes="n t h w", train=(1, 7), val=(8, 10)))
    assert [(s.split, s.path.stem, s.item["first"]) for s in samples] == [
        *(("train", "a", index) for index in range(1, 5)),
        ("train", "b", 0),
        ("train", "b", 1),
        ("val", "b", 3),
        ("val", "b", 4),
    ]
    with pytest.raises(UsageError, match=r"source\.val ends at 11, but there are 10 samples"):
        walk(ArraysSource(path=tmp_path, axes="n t h w", val=(8, 11)))


def test_entries_are_held_out_by_their_keys(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((200, 1, 2, 2), np.uint8))
    held_out = [s.item["first"] for s in walk(ArraysSource(path=tmp_path, axes="n t h w")) if s.split == "val"]
    assert 8 <= len(held_out) <= 40
    assert held_out != list(range(200 - len(held_out), 200))


@pytest.mark.parametrize("changes", [{}, {"train": (0, 70), "val": (72, 100)}])
def test_sequences_are_cut_from_time_and_validation_comes_after_training(tmp_path, changes):
    array = np.arange(100)[:, None, None] * np.ones((1, 2, 2))
    np.save(tmp_path / "long.npy", array)
    config = ArraysSource(path=tmp_path / "long.npy", axes="t h w", sequence=8, **changes)
    samples, arrays = samples_and_arrays(config)
    steps = {"train": [], "val": []}
    for sample, got in zip(samples, arrays, strict=True):
        first, end = sample.metadata["steps"]
        assert got[:, 0, 0, 0].tolist() == list(range(first, end))
        assert end - first == 8
        steps[sample.split] += range(first, end)
    assert max(steps["train"]) < min(steps["val"])
    assert len(set(steps["train"] + steps["val"])) == 8 * len(samples)
    assert len(samples) == (12 if not changes else 8 + 3)  # what is left of a range is no sequence


def test_no_sequence_spans_two_files(tmp_path):
    for name, length in (("a", 10), ("b", 3), ("c", 9)):
        np.save(tmp_path / f"{name}.npy", np.zeros((length, 2, 2)))
    samples = walk(ArraysSource(path=tmp_path, axes="t h w", sequence=4, validation_fraction=0.3))
    assert [(s.path.stem, s.item["first"], s.split) for s in samples] == [
        ("a", 0, "train"),
        ("a", 4, "train"),
        ("c", 0, "train"),
        ("c", 4, "val"),
    ]


def written(config, folder, shards=3):
    samples = walk(config)
    plans = plan_shards(config, samples, describe(config, samples), shards=shards, window_bytes=2**20, seed=0)
    write_shards(folder, plans)
    return merge(folder)


def test_the_sets_moments_are_numpys_mean_and_deviation_in_float64(tmp_path):
    scale, offset = np.array([1.0, 1e-3]), np.array([1e4, -5.0])  # a mean far from zero: float32 sums would be off
    array = np.random.default_rng(0).normal(size=(50, 4, 8, 8, 2)) * scale + offset
    np.save(tmp_path / "a.npy", array)
    names = {"channels": ("temperature", "wind"), "units": ("K", "m/s")}
    config = ArraysSource(path=tmp_path / "a.npy", axes="n t h w c", train=(0, 50), **names)
    manifest = written(config, tmp_path / "out")
    stored = array.astype(np.float32).astype(np.float64)
    moments = manifest.moments
    assert moments.count == 50 * 4 * 8 * 8
    np.testing.assert_allclose(moments.mean, stored.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(np.array(moments.m2) / moments.count), stored.std((0, 1, 2, 3)), rtol=1e-9)
    assert (manifest.dtype, manifest.channels, manifest.units) == ("float32", ["temperature", "wind"], ["K", "m/s"])


def test_members_of_the_shards_are_the_arrays_and_say_what_they_are(tmp_path):
    np.save(tmp_path / "a.npy", numbers("n t h w c", "uint8"))
    manifest = written(
        ArraysSource(path=tmp_path / "a.npy", axes="n t h w c", train=(0, 5)), tmp_path / "out", shards=1
    )
    assert (manifest.dtype, manifest.moments) == ("uint8", None)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    about = {name[:-5]: json.loads(text) for name, text in members.items() if name.endswith(".json")}
    assert len(about) == 5
    for key, says in about.items():
        array = np.load(io.BytesIO(members[f"{key}.npy"]))
        np.testing.assert_array_equal(array, numbers("n t h w c", "uint8")[int(says["name"][-6:])])
        assert (says["frames"], says["height"], says["width"], says["class"]) == (4, 3, 6, -1)
        assert (says["source"], says["fps"]) == ("arrays", None)


def test_values_that_are_not_finite_leave_their_sample_out_by_name(tmp_path):
    array = numbers("n t h w")
    array[1, 0, 0, 0], array[3, 1, 1, 1], array[4, 0, 0, 0] = np.nan, np.inf, 1e300  # beyond float32
    np.save(tmp_path / "a.npy", array)
    config = ArraysSource(path=tmp_path / "a.npy", axes="n t h w", train=(0, 5))
    with pytest.raises(DecodeError, match="infinite or not a number"):
        read(config, walk(config)[4])
    manifest = written(config, tmp_path / "out", shards=1)
    assert (manifest.samples, manifest.skipped) == (2, 3)
    record = json.loads((tmp_path / "out" / "shard-000000.json").read_text())
    assert sorted(key[:12] for key in record["skipped"]) == ["a_npy_000001", "a_npy_000003", "a_npy_000004"]
    assert np.isfinite(manifest.moments.mean).all()


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    trap = np.empty((1, 1, 1), object)
    trap[0, 0, 0] = Trap()
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", trap=trap)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UsageError, match=r"holds object, not numbers \(nothing is unpickled\)"):
            walk(ArraysSource(path=tmp_path / name, axes="t h w"))
    assert not (tmp_path / "sprung").exists()


def test_an_npy_larger_than_memory_is_read_a_sample_at_a_time(tmp_path):
    shape = (20, 100_000, 64, 64)  # 8 GB, of which the disk holds one sample
    array = np.lib.format.open_memmap(tmp_path / "sparse.npy", "w+", np.uint8, shape)
    array[:, 77_777] = np.arange(20, dtype=np.uint8)[:, None, None]
    array.flush()
    config = ArraysSource(path=tmp_path / "sparse.npy", axes="t n h w", train=(77_777, 77_778))
    tracemalloc.start()
    _, (got,) = samples_and_arrays(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got[:, 5, 5, 0].tolist() == list(range(20))
    assert peak < 2_000_000


def test_the_config_of_moving_mnists_test_file_reads_its_published_shape(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "mnist_test_seq.npy", "w+", np.uint8, (20, 10_000, 64, 64))
    array[3, 9_999, 1, 2] = 255
    array.flush()
    text = (Path(__file__).parents[2] / "configs/data/moving_mnist.yaml").read_text()
    source = yaml.safe_load(text)["source"] | {"path": tmp_path / "mnist_test_seq.npy"}
    config = ArraysSource(**source)
    samples = walk(config)
    assert len(samples) == 10_000
    assert {sample.split for sample in samples} == {"val"}
    got = np.load(io.BytesIO(read(config, samples[-1])[1]))
    assert (got.shape, got.dtype, got[3, 1, 2, 0], got.sum()) == ((20, 64, 64, 1), np.uint8, 255, 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": "t h w"}, r"has 4 axes \(4, 3, 6, 2\); source\.axes names 3"),
        ({"channels": ("a", "b", "c")}, r"2 channels; source\.channels names 3"),
        ({"sequence": 9}, r"no sample in steps 0 to 4; source\.sequence asks for 9 steps"),
        ({"path": "none.npy"}, r"no \.npy or \.npz there"),
        ({"path": "text.npy"}, "no array that can be read"),
        ({"path": "header.npy"}, "no array that can be read"),
        ({"path": "text.npz"}, "no array that can be read"),
        ({"path": "*.npy"}, "no array that can be read"),
    ],
)
def test_errors_say_what_where_and_what_to_do(tmp_path, changes, message):
    np.save(tmp_path / "a.npy", numbers("t h w c"))
    for name in ("text.npy", "text.npz"):
        (tmp_path / name).write_text("hello")
    damaged = (tmp_path / "a.npy").read_bytes().replace(b"'shape': (", b"'shape': )")  # for numpy a SyntaxError
    (tmp_path / "header.npy").write_bytes(damaged)
    config = ArraysSource(**{"path": tmp_path / "a.npy"} | changes | {"path": tmp_path / changes.get("path", "a.npy")})
    with pytest.raises(UsageError, match=message) as caught:
        walk(config)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_of_other_shapes_or_types_are_not_one_set(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 3)))
    np.save(tmp_path / "b.npy", np.zeros((9, 3, 3)))
    assert len(walk(ArraysSource(path=tmp_path, axes="t h w"))) == 2
    np.save(tmp_path / "c.npy", np.zeros((4, 3, 5)))
    with pytest.raises(UsageError, match=r"c\.npy: float64 .* the arrays of one set have one type"):
        walk(ArraysSource(path=tmp_path, axes="t h w"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"axes": "t h"},
        {"axes": "t h w w"},
        {"axes": "t h w x"},
        {"axes": "n t h w", "sequence": 3},
        {"train": (0, 10), "val": (9, 12)},
        {"val": (5, 5)},
        {"units": ("K",)},
    ],
)
def test_configs_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        ArraysSource(path="a.npy", **wrong)


def steps_of(samples):
    """The steps that the samples of each split reach over, counted on over the files a and b of 60 steps."""
    steps = {}
    for sample in samples:
        first, end = sample.metadata["steps"]
        before = 60 if sample.path.stem == "b" else 0
        steps.setdefault(sample.split, set()).update(range(before + first, before + end))
    return steps


@pytest.fixture
def two_recordings(tmp_path):
    """Two files of 60 steps; the value of each step is its number over both."""
    for name, first in (("a", 0), ("b", 60)):
        np.save(tmp_path / f"{name}.npy", np.arange(first, first + 60, dtype=float)[:, None, None] * np.ones((1, 2, 2)))
    return tmp_path


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", [{"sequence": 6}, {"offsets": (-4, -1, 0, 3)}])
def test_sliding_windows_start_every_so_many_steps_and_hold_those_steps(two_recordings, cut, every):
    config = ArraysSource(path=two_recordings, axes="t h w", **cut, every=every, train=(0, 40), val=(40, 70))
    samples, arrays = samples_and_arrays(config)
    relative = [0, 1, 2, 3, 4, 5] if "sequence" in cut else [0, 3, 4, 7]
    span, got = relative[-1] + 1, {"train": [], "val": []}
    for sample, array in zip(samples, arrays, strict=True):
        frames = array[:, 0, 0, 0].tolist()
        got[sample.split].append(frames[0])
        assert frames == [frames[0] + step for step in relative]
        assert sample.metadata.get("offsets") == (list(cut["offsets"]) if "offsets" in cut else None)
    assert got["train"] == list(range(0, 40 - span + 1, every))
    assert got["val"] == [*range(40, 60 - span + 1, every), *range(60, 70 - span + 1, every)]


@pytest.mark.parametrize("every", [1, 4, None])
@pytest.mark.parametrize(
    "splits",
    [
        {"train": (0, 50), "val": (50, 70), "test": (70, 120)},
        {"validation_fraction": 0.2},
        {"validation_fraction": 0.7},
    ],
)
def test_no_step_of_a_window_is_in_two_splits(two_recordings, splits, every):
    steps = steps_of(walk(ArraysSource(path=two_recordings, axes="t h w", sequence=8, every=every, **splits)))
    assert set(steps) == ({"train", "val", "test"} if "test" in splits else {"train", "val"})
    for one, other in itertools.combinations(steps, 2):
        assert max(steps[one]) < min(steps[other])


def test_the_hold_out_of_sliding_windows_drops_only_those_that_reach_into_it(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((29, 2, 2)))
    samples = walk(ArraysSource(path=tmp_path, axes="t h w", sequence=10, every=1, validation_fraction=0.25))
    starts = {split: [s.item["first"] for s in samples if s.split == split] for split in ("train", "val")}
    assert starts == {"train": [*range(0, 6)], "val": [*range(15, 20)]}


def test_where_all_training_windows_reach_into_validation_that_is_said(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((12, 2, 2)))
    with pytest.raises(UsageError, match=r"^3 samples of 10 steps: those that are left for training reach into"):
        walk(ArraysSource(path=tmp_path, axes="t h w", sequence=10, every=1))


def test_a_test_range_is_a_split_of_its_own(two_recordings):
    ranges = {"train": (0, 30), "val": (30, 40), "test": (60, 90)}
    samples = walk(ArraysSource(path=two_recordings, axes="t h w", sequence=10, **ranges))
    assert [s.split for s in samples] == ["train"] * 3 + ["val"] + ["test"] * 3
    with pytest.raises(UsageError, match=r"source\.test ends at 121, but there are 120 steps"):
        walk(ArraysSource(path=two_recordings, axes="t h w", sequence=10, test=(60, 121)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": 4, "offsets": (0, 1)}, "sequence and offsets both say"),
        ({"offsets": (0, 3, 3)}, r"offsets \[0, 3, 3\] must ascend"),
        ({"every": 2}, "give sequence or offsets too"),
        ({"axes": "n t h w", "offsets": (0, 1)}, "offsets cut arrays without an axis n"),
        ({"sequence": 4, "val": (0, 10), "test": (9, 12)}, r"val \[0, 10\] and test \[9, 12\] overlap"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ArraysSource(path="a.npy", **{"axes": "t h w", **changes})


def test_keys_that_are_left_out_leave_configs_of_earlier_versions_what_they_were():
    saved = ArraysSource(path="a.npy").model_dump()
    assert not {"offsets", "every", "test"} & set(saved)


def compressed(folder: Path, *names: str, shape=(6, 4, 40, 40)) -> ArraysSource:
    """Files .npz of ``shape`` n t h w, whose values say which file and sample they are of."""
    folder.mkdir()
    for number, name in enumerate(names):
        values = np.broadcast_to(10 * number + np.arange(shape[0], dtype=np.uint8)[:, None, None, None], shape)
        np.savez_compressed(folder / name, frames=values)
    return ArraysSource(path=folder, axes="n t h w", validation_fraction=0)


def test_an_npz_is_unpacked_once_however_its_samples_are_shuffled(tmp_path):
    config, scratch = compressed(tmp_path / "arrays", "a", "b", "c"), tmp_path / "scratch"
    samples = walk(config)
    for first in samples[::6]:
        read(config, first, scratch)
        first.path.unlink()
    for sample in sorted(samples, key=lambda sample: sample.item["first"]):
        number, index = "abc".index(sample.path.stem), sample.item["first"]
        _, data = read(config, sample, scratch)
        assert (np.load(io.BytesIO(data)) == 10 * number + index).all()


def test_an_npz_takes_no_more_memory_than_a_sample(tmp_path):
    config = compressed(tmp_path / "arrays", "a", shape=(400, 4, 100, 100))  # 16 MB
    sample = walk(config)[77]
    tracemalloc.start()
    read(config, sample, tmp_path / "scratch")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000


def test_files_that_are_one_sample_each_are_not_unpacked_to_disk(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", numbers("t h w"))
    config = ArraysSource(path=tmp_path / "a.npz", axes="t h w", validation_fraction=0)
    (sample,) = walk(config)
    read(config, sample, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_what_is_unpacked_for_a_set_is_shared_by_the_workers_and_gone_in_the_end(tmp_path, monkeypatch):
    config, folder = compressed(tmp_path / "arrays", "a", "b"), tmp_path / "shards"
    samples = walk(config)
    seen, left = set(), folder / ".unpacked-000000"
    left.mkdir(parents=True)
    (left / "of_a_killed_process.npy").touch()

    def watched(folder, plan, looks):
        def each():
            for look in looks:
                seen.update(path.name for path in left.glob("*"))
                yield look

        write_shard(folder, plan, each())

    write_shard = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", watched)
    about = {"shards": 2, "window_bytes": 2**20, "seed": 0}
    write_shards(folder, plan_shards(config, samples, describe(config, samples), **about), workers=2)
    assert merge(folder).samples == 12
    assert len({name for name in seen if name.endswith(".npy") and not name.startswith(".")}) == 2
    assert "of_a_killed_process.npy" not in seen
    assert not left.exists()


def test_a_full_disk_ends_the_job_instead_of_leaving_samples_out(tmp_path, monkeypatch):
    config = compressed(tmp_path / "arrays", "a")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.sources.arrays.shutil.copyfileobj", full)
    with pytest.raises(UserError, match="scratch: No space left on device; free some space or choose") as caught:
        read(config, walk(config)[0], tmp_path / "scratch")
    assert not isinstance(caught.value, DecodeError)
