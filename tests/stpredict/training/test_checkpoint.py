"""What is kept, what counts as complete, and what is said of files that are not as they were written."""

import hashlib
import json
import shutil
from math import inf, isnan, nan
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from stpredict.training.checkpoint import (
    INDEX,
    MARKER,
    STATE,
    CheckpointState,
    TensorEntry,
    Written,
    all_checkpoints,
    build_index,
    bytes_of,
    complete_checkpoints,
    damage,
    has_completed,
    point_to,
    read_index,
    read_marker,
    read_state,
    step_of,
    surplus,
    why_unusable,
    write_complete,
)
from stpredict.training.config import BestConfig, CheckpointConfig

# Written out: what the files of a run say must not change with the code.
STATE_TEXT = {
    "format": 2,
    "step": 4,
    "samples_consumed": {"toy": 32},
    "quarantined": {},
    "world_size": 1,
    "zero_stage": 2,
    "precision": "fp32",
    "optimizer_steps": {"model": 4},
    "config": {},
    "metrics": {"psnr": 20.0},
    "export": {},
}


def checkpoint(checkpoints: Path, step: int, **metrics: float) -> Path:
    """A complete one of one rank, whose rank file is no safetensors."""
    folder = checkpoints / f"step_{step:08d}"
    folder.mkdir(parents=True)
    content = f"weights of {step}".encode()
    (folder / "rank_00000.safetensors").write_bytes(content)
    state = CheckpointState.model_validate({**STATE_TEXT, "step": step, "metrics": metrics})
    index = {"model/weight/w": TensorEntry(shape=(2, 3), dtype="F32", pieces=[(0, 0, 6)])}
    files = {
        "rank_00000.safetensors": Written(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),
    }
    write_complete(folder, state, index, files)
    point_to(folder)
    return folder


def steps(folders) -> list[int]:
    return [step_of(folder) for folder in folders]


def test_a_completed_checkpoint_is_sound_and_the_newest(tmp_path):
    folder = checkpoint(tmp_path, 4, psnr=20.0)
    assert why_unusable(folder) is None
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert read_state(folder).metrics == {"psnr": 20.0}
    assert read_index(folder)["model/weight/w"].elements == 6
    marker = json.loads((folder / MARKER).read_text())["files"]
    assert marker.keys() == {"rank_00000.safetensors", INDEX, STATE}
    for name, written in marker.items():
        data = (folder / name).read_bytes()
        assert written == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert bytes_of(tmp_path) == sum(len(path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    assert bytes_of(tmp_path / "nothing") == 0


def test_checkpoints_are_listed_by_step_and_copies_under_other_names_are_none(tmp_path):
    for step in (20, 100_000_000, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "step_00000005").mkdir()
    for name in ("step_00000020_good", "step_backup", "step_"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text("{}")
    assert steps(all_checkpoints(tmp_path)) == [3, 5, 20, 100_000_000]
    assert steps(complete_checkpoints(tmp_path)) == [3, 20, 100_000_000]
    assert complete_checkpoints(tmp_path / "nothing") == []


def test_that_a_checkpoint_was_completed_once_is_remembered_without_its_marker(tmp_path):
    assert not has_completed(tmp_path)
    (tmp_path / "step_00000002").mkdir()
    assert not has_completed(tmp_path)  # killed in its first save
    folder = checkpoint(tmp_path, 4)
    (tmp_path / "latest").unlink()
    assert has_completed(tmp_path)  # killed between the marker and latest
    (tmp_path / "latest").write_text("step_00000004\n")
    (folder / MARKER).unlink()
    assert has_completed(tmp_path)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep": 1}, [10]),
        ({"keep": 3}, [6, 8, 10]),
        ({"keep": 99}, [2, 4, 6, 8, 10]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep": 1, "best": {"metric": "psnr"}}, [4, 10]),  # of 4 and 8, equally good, the later; 8 is not rated
        ({"keep": 1, "best": {"metric": "psnr", "keep": 2}}, [2, 4, 10]),
        ({"keep": 1, "best": {"metric": "psnr", "mode": "min"}}, [6, 10]),
        ({"keep": 1, "best": {"metric": "absent"}}, [10]),
        ({"keep": 1, "keep_every": 6, "best": {"metric": "psnr"}}, [4, 6, 10]),
    ],
)
def test_retention_keeps_the_newest_every_nth_and_the_best(tmp_path, settings, kept):
    for step, values in {2: {"psnr": 21.0}, 4: {"psnr": 21.0}, 6: {"psnr": 19.0}, 8: {}, 10: {"psnr": 20.0}}.items():
        checkpoint(tmp_path, step, **values)  # 8 was saved because of a signal, without a validation
    gone = surplus(tmp_path, 10, CheckpointConfig.model_validate(settings))
    assert sorted(steps(gone) + kept) == [2, 4, 6, 8, 10]


def test_an_incomplete_checkpoint_is_neither_kept_for_another_nor_counted(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "step_00000004" / MARKER).unlink()
    assert steps(surplus(tmp_path, 6, CheckpointConfig(keep=2))) == []


def test_a_given_up_checkpoint_takes_no_others_place_and_goes_when_its_step_is_past(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step, psnr=float(step))
    given_up = {tmp_path / "step_00000006"}
    config = CheckpointConfig(keep=1, keep_every=6, best=BestConfig(metric="psnr"))
    assert steps(surplus(tmp_path, 4, config, given_up)) == [2]  # 6 is still ahead
    checkpoint(tmp_path, 5, psnr=0.0)
    assert steps(surplus(tmp_path, 5, config, given_up)) == [2]  # 4 is the best of the good ones
    checkpoint(tmp_path, 8, psnr=0.0)
    assert steps(surplus(tmp_path, 8, config, given_up)) == [2, 5, 6]


def test_a_checkpoint_whose_metrics_cannot_be_read_is_not_the_best_and_stops_nothing(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step, psnr=float(-step))
    (tmp_path / "step_00000002" / STATE).write_text("{")
    gone = surplus(tmp_path, 6, CheckpointConfig(keep=1, best=BestConfig(metric="psnr")))
    assert steps(gone) == [2]


def test_metrics_and_settings_that_are_no_finite_number_are_read_as_they_were_written(tmp_path):
    state = CheckpointState.model_validate(
        {**STATE_TEXT, "metrics": {"psnr": inf, "loss": nan}, "config": {"clip": inf}}
    )
    write_complete(checkpoint(tmp_path, 4), state, {}, {})
    again = read_state(tmp_path / "step_00000004")
    assert (again.metrics["psnr"], isnan(again.metrics["loss"]), again.config) == (inf, True, {"clip": inf})


@pytest.mark.parametrize(("mode", "values"), [("max", (3.0, nan, 1.0)), ("min", (1.0, nan, 3.0))])
def test_a_metric_that_is_no_number_is_not_the_best_and_hides_none(tmp_path, mode, values):
    for step, value in enumerate(values, 1):
        checkpoint(tmp_path, step, psnr=value)
    checkpoint(tmp_path, 4)
    assert steps(surplus(tmp_path, 4, CheckpointConfig(keep=1, best=BestConfig(metric="psnr", mode=mode)))) == [2, 3]


def test_what_is_removed_while_bytes_are_counted_stops_nothing(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, 4)
    before, stat = bytes_of(tmp_path), Path.stat

    def removing(path, **options):
        result = stat(path, **options)
        if path.parent == folder:
            shutil.rmtree(folder)
        return result

    monkeypatch.setattr(Path, "stat", removing)
    assert bytes_of(tmp_path) < before


def test_damage_names_every_file_and_what_is_wrong_with_it(tmp_path):
    folder = checkpoint(tmp_path, 4)
    files = read_marker(folder)
    assert damage(folder, files.items()) == []
    content = bytearray((folder / "rank_00000.safetensors").read_bytes())
    content[3] ^= 1
    (folder / "rank_00000.safetensors").write_bytes(content)
    (folder / INDEX).unlink()
    (folder / STATE).write_text("{}")
    size = files[STATE].bytes
    assert damage(folder, files.items()) == [
        "index.json is missing",
        "rank_00000.safetensors differs from what was written",
        f"state.json has 2 bytes of {size:,}",
    ]
    assert why_unusable(folder) == (
        "is damaged (index.json is missing; rank_00000.safetensors differs from what was written; "
        f"state.json has 2 bytes of {size:,})"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"state.json": 12}', '{"state.json": {"bytes": 12}}', b"\xff\xfe"],
    ids=["empty", "cut", "list", "number", "sizes only", "no sha256", "no text"],
)
def test_a_damaged_marker_is_said_to_be_so(tmp_path, text):
    folder = checkpoint(tmp_path, 4)
    (folder / MARKER).write_bytes(text.encode() if isinstance(text, str) else text)
    assert why_unusable(folder) == "has a marker, COMPLETE, that is damaged or of another version"


def test_no_bit_of_a_marker_flips_unnoticed(tmp_path):
    folder = checkpoint(tmp_path, 4)
    text = (folder / MARKER).read_bytes()
    for at in range(len(text) - 1):  # the last is the end of the line
        for bit in range(8):
            flipped = bytearray(text)
            flipped[at] ^= 1 << bit
            (folder / MARKER).write_bytes(flipped)
            try:
                same = json.loads(flipped) == json.loads(text)  # another kind of white space
            except ValueError:
                same = False
            assert same or why_unusable(folder), (at, bit)


def test_without_a_readable_marker_a_checkpoint_cannot_be_used(tmp_path):
    folder = checkpoint(tmp_path, 4)
    (folder / MARKER).unlink()
    assert why_unusable(folder) == "has no COMPLETE marker (its save was interrupted)"
    (folder / MARKER).mkdir()
    assert why_unusable(folder) == "has a marker, COMPLETE, that cannot be read (Is a directory)"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 3}, "format: Input should be 2"),
        ({"step": None}, "step: Input should be a valid integer"),
        ({"samples_consumed": [3]}, "samples_consumed: Input should be an object"),
    ],
)
def test_a_state_of_another_version_is_one_line(tmp_path, change, why):
    (tmp_path / STATE).write_text(json.dumps(STATE_TEXT))
    assert read_state(tmp_path).samples_consumed == {"toy": 32}
    (tmp_path / STATE).write_text(json.dumps({**STATE_TEXT, **change}))
    with pytest.raises(UserError) as error:
        read_state(tmp_path)
    assert str(error.value) == f"{tmp_path / STATE}: cannot be read ({why}); use another checkpoint"


@pytest.mark.parametrize("read", [read_state, read_index])
@pytest.mark.parametrize("text", [None, "", '{"a"', "[1]", '{"a": 3}', b"\xff"])
def test_a_state_or_index_that_cannot_be_read_is_one_line(tmp_path, read, text):
    name = STATE if read is read_state else INDEX
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / name}: cannot be read (")
    assert line.endswith("); use another checkpoint")
    assert "\n" not in line


def test_an_index_has_the_pieces_of_all_ranks_in_order():
    held = [
        [("w", (2, 3), "F32", 4, 6), ("b", (3,), "F32", 0, 3), ("s", (), "I64", 0, 1)],
        [("w", (2, 3), "F32", 0, 4)],
    ]
    index = build_index(held)
    assert {key: entry.pieces for key, entry in index.items()} == {
        "w": [(1, 0, 4), (0, 4, 6)],
        "b": [(0, 0, 3)],
        "s": [(0, 0, 1)],
    }
    assert (index["w"].shape, index["w"].dtype, index["w"].elements, index["s"].elements) == ((2, 3), "F32", 6, 1)


@pytest.mark.parametrize(
    "pieces",
    [[(0, 0, 5)], [(0, 1, 6)], [(0, 0, 4), (1, 3, 6)], [(0, 0, 2), (1, 3, 6)], [(0, 0, 6), (1, 0, 6)], [(0, 0, 7)]],
    ids=["end missing", "start missing", "overlap", "gap", "twice", "too long"],
)
def test_pieces_that_do_not_cover_a_tensor_once_are_refused(pieces):
    held = [[("w", (2, 3), "F32", start, stop) for rank, start, stop in pieces if rank == r] for r in (0, 1)]
    with pytest.raises(ValueError, match="w: 6 elements, but the ranks hold"):
        build_index(held)
