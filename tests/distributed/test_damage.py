"""Full disks, damaged checkpoints and those of another model, in two real ranks: what was good stays good, what is not
is named, and training goes on from the newest that is sound."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stpredict.run import Run
from stpredict.training import saving
from stpredict.training.checkpoint import MARKER, bytes_of, read_index, read_state, why_unusable
from tests.distributed.faults import BALLAST, LEFT, fill
from tests.distributed.kills import CONFIGS, Nursery, compare, files, last_lines
from tests.distributed.kills import trial as kill_trial

FP32 = list(CONFIGS)[1]
STEPS = 8
NAMES = [f"step_{step:08d}" for step in range(STEPS + 1)]
DISK_BYTES = 1 << 20
TYPE_BYTES = {"F32": 4, "F64": 8, "BF16": 2, "I64": 8}


def trial(run: str, checkpoint: dict[str, Any] | None = None, **changes) -> dict[str, Any]:
    """Eight steps in fp32 under ZeRO-3, saved every other one."""
    found = kill_trial(FP32)
    checkpoint = {"every": 2, "keep": 2, **(checkpoint or {})}
    training = {**found["training"], "steps": STEPS, "validate_every": 1, "checkpoint": checkpoint}
    return {**found, "run": run, "training": training, **changes}


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def base(nursery, tmp_path_factory) -> Path:
    """``whole``: uninterrupted. ``stopped``: by a signal at step 6, with checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("damage")
    best = {"keep": 1, "every": 1, "keep_every": 5, "best": {"metric": "l2", "mode": "min", "keep": 2}}
    trials = [trial("whole"), trial("stopped", until=6), trial("retained", checkpoint=best), trial("first", until=2)]
    ended = nursery.start(trials, out, out / "log")
    assert ended["signals"] == [0, 0], last_lines(out / "log")
    return out


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_retention_keeps_the_newest_every_nth_and_the_best(base):
    run = base / "retained"
    values = {row["step"]: row["l2"] for row in Run(run).metrics() if row["split"] == "val"}
    best = sorted(values, key=values.get)[:2]
    assert names(run) == [NAMES[step] for step in sorted({STEPS, 5, *best})]
    assert {read_state(run / "checkpoints" / NAMES[step]).metrics["l2"] for step in best} == {values[s] for s in best}


def test_a_checkpoint_that_somebody_removes_before_retention_does_stops_nothing(nursery, base, tmp_path):
    ended = nursery.start([trial("run")], tmp_path, tmp_path / "log", fault="removed_by_hand")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    assert compare(base / "whole", tmp_path / "run") == []


def test_all_ranks_say_that_training_waited_for_the_slow_disk_of_one(nursery, base, tmp_path):
    ended = nursery.start([trial("run")], tmp_path, tmp_path / "log", fault="slow_disk")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    for rank, level in enumerate(("WARNING", "INFO")):  # the terminal shows rank 0's and all ranks' warnings
        lines = (tmp_path / "log" / f"rank_{rank}.log").read_text().splitlines()
        said = f"{level} step 6: training waited for the checkpoint of step 4, which took 2."
        assert sum(line.startswith(said) for line in lines) == 1
    assert compare(base / "whole", tmp_path / "run") == []


# Damage


def flip(path: Path, at: float = 0.5) -> None:
    """One bit, at a share of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


RANK, RANDOM = "rank_00001.safetensors", "random_00000.pt"
DIFFERS = "is damaged ({} differs from what was written)"
DAMAGES = {
    "rank": (RANK, flip, DIFFERS),
    "rank_header": (RANK, lambda path: flip(path, 0), DIFFERS),
    "rank_end": (RANK, lambda path: flip(path, 1), DIFFERS),
    "random": (RANDOM, flip, DIFFERS),
    "index": ("index.json", flip, DIFFERS),
    "state": ("state.json", flip, DIFFERS),
    "marker": (MARKER, lambda path: flip(path, 0), "has a marker, COMPLETE, that is damaged or of another version"),
    "marker_cut": (MARKER, truncate, "has a marker, COMPLETE, that is damaged or of another version"),
    "marker_gone": (MARKER, Path.unlink, "has no COMPLETE marker (its save was interrupted)"),
    "cut": (RANK, truncate, "bytes of "),
    "gone": (RANK, Path.unlink, "is damaged ({} is missing)"),
    "random_gone": (RANDOM, Path.unlink, "is damaged ({} is missing)"),
}


@pytest.fixture(scope="module")
def mended(nursery, base, tmp_path_factory) -> tuple[Path, str]:
    """``stopped`` with its newest checkpoint damaged in every way, continued; and the log of that."""
    out = tmp_path_factory.mktemp("mended")
    for name, (file, change, _) in DAMAGES.items():
        shutil.copytree(base / "stopped", out / name)
        change(out / name / "checkpoints" / NAMES[6] / file)
    ended = nursery.start([trial(name) for name in DAMAGES], out, out / "log")
    assert ended["signals"] == [0, 0], last_lines(out / "log")
    return out, (out / "log" / "rank_0.log").read_text()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_leads_to_the_same_bits(mended, base, name):
    out, log = mended
    file, _, reason = DAMAGES[name]
    [line] = [line for line in log.splitlines() if line.endswith(": skipped") and f"/{name}/" in line]
    assert f"{NAMES[6]} " in line
    assert reason.format(file) in line
    assert f"continuing from {out / name / 'checkpoints' / NAMES[4]}\n" in log
    assert compare(base / "whole", out / name) == []


def test_a_damaged_checkpoint_takes_no_good_ones_place(nursery, base, tmp_path):
    """Continued from step 4, past the damaged step 6 without saving there: the two kept are good ones."""
    shutil.copytree(base / "stopped", tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / NAMES[6] / RANK)
    ended = nursery.start([trial("run", checkpoint={"every": 4})], tmp_path, tmp_path / "log")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    assert names(tmp_path / "run") == [NAMES[4], NAMES[8]]
    assert all(why_unusable(tmp_path / "run" / "checkpoints" / name) is None for name in (NAMES[4], NAMES[8]))


def error_of(nursery, out: Path, *trials: dict[str, Any], log: str = "log", **how: Any) -> str:
    """The one line with which both ranks end."""
    ended = nursery.start(list(trials), out, out / log, **how)
    assert ended["signals"] == [1, 1], last_lines(out / log)
    lines = [(out / log / f"rank_{rank}.log").read_text().strip().splitlines()[-1] for rank in (0, 1)]
    assert lines[0] == lines[1]
    kind, _, text = lines[0].partition(": ")
    assert kind in ("data_pipeline.errors.UserError", "data_pipeline.errors.UsageError"), last_lines(out / log)
    return text


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {NAMES[4]: ("state.json", flip), NAMES[6]: (MARKER, Path.unlink)},
            f"{NAMES[6]} has no COMPLETE marker (its save was interrupted); "
            f"{NAMES[4]} is damaged (state.json differs from what was written)",
        ),
        ({NAMES[4]: ("", shutil.rmtree), NAMES[6]: ("", shutil.rmtree)}, "they are gone"),
    ],
)
def test_a_run_without_a_sound_checkpoint_refuses_to_begin_anew(nursery, base, tmp_path, changes, problems):
    run = tmp_path / "run"
    shutil.copytree(base / "stopped", run)
    for name, (file, change) in changes.items():
        change(run / "checkpoints" / name / file)
    before = content(run / "checkpoints")
    assert error_of(nursery, tmp_path, trial("run")) == (
        f"{run / 'checkpoints'}: none of its checkpoints can be used ({problems}); "
        "to train from the start, remove this folder"
    )
    assert content(run / "checkpoints") == before
    shutil.rmtree(run / "checkpoints")
    ended = nursery.start([trial("run")], tmp_path, tmp_path / "log_anew")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log_anew")
    assert compare(base / "whole", run) == []


# Another model


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(nursery, base, tmp_path):
    shutil.copytree(base / "stopped", tmp_path / "rich")
    rich, newest = tmp_path / "rich", tmp_path / "rich" / "checkpoints" / NAMES[6]
    before = content(rich / "checkpoints")
    text = error_of(nursery, tmp_path, trial("rich", rich=False))
    assert text.startswith(f"{newest}: a checkpoint of another model: it has besides discriminator/weight/0.bias, ")
    text = error_of(nursery, tmp_path, trial("rich"), log="log_shapes", fault="narrower")
    assert "shapes differ: model/weight/first.bias (16,) → (12,)" in text
    assert "exp_avg" not in text
    assert content(rich / "checkpoints") == before


def test_a_checkpoint_without_a_discriminator_is_refused(nursery, tmp_path):
    text = error_of(nursery, tmp_path, trial("plain", rich=False, until=1), trial("plain"))
    assert "a checkpoint of another model: it lacks discriminator/weight/0.bias, " in text


# Full disks


@pytest.fixture
def disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def on(disk: Path, run: Path) -> Path:
    """Puts the run's checkpoints on ``disk``; the rest of a run needs room too."""
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    return run / "checkpoints"


@pytest.mark.parametrize("failure", ["full_before", "full_while_writing"])
def test_a_full_disk_stops_the_run_in_one_line_and_costs_no_checkpoint(nursery, base, disk, tmp_path, failure):
    checkpoints = on(disk, tmp_path / "run")
    text = error_of(nursery, tmp_path, trial("run"), fault=failure)
    folder = checkpoints / NAMES[4]
    if failure == "full_before":
        assert text.startswith(f"{folder}: a checkpoint needs ")
        assert f"{saving._size(LEFT)} are free; make room and run again: it continues from the last checkpoint" in text
    else:
        assert text.startswith(f"{folder}: cannot be written: ")
        assert "No space left on device" in text
        assert text.endswith(
            f"; {checkpoints / NAMES[2]} is untouched; make room and run again: it continues from the last checkpoint"
        )
    assert why_unusable(checkpoints / NAMES[2]) is None
    assert (checkpoints / "latest").read_text() == f"{NAMES[2]}\n"
    (disk / BALLAST).unlink()
    ended = nursery.start([trial("run")], tmp_path, tmp_path / "log_again")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log_again")
    assert f"continuing from {checkpoints / NAMES[2]}\n" in (tmp_path / "log_again" / "rank_0.log").read_text()
    assert compare(base / "whole", tmp_path / "run") == []


def test_a_disk_that_is_full_for_one_rank_stops_all_with_its_reason(nursery, base, tmp_path):
    text = error_of(nursery, tmp_path, trial("run"), fault="full_on_rank_1")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert text.startswith(f"{checkpoints / NAMES[4]}: cannot be written: No space left on device; ")
    assert names(tmp_path / "run") == [NAMES[2]]
    ended = nursery.start([trial("run")], tmp_path, tmp_path / "log_again")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log_again")
    assert compare(base / "whole", tmp_path / "run") == []


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_where_so_configured_and_saves_again_once_there_is_room(
    nursery, base, disk, tmp_path, background
):
    on(disk, tmp_path / "run")
    settings = trial("run", checkpoint={"on_failure": "continue", "background": background})
    ended = nursery.start([settings], tmp_path, tmp_path / "log", fault="full_and_room_again")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    log = (tmp_path / "log" / "rank_0.log").read_text()
    [line] = [line for line in log.splitlines() if line.startswith("ERROR")]
    assert "training goes on without a checkpoint: " in line
    assert f"{NAMES[4]}: cannot be written: " in line
    assert compare(base / "whole", tmp_path / "run") == []


def test_the_last_checkpoint_must_be_written_whatever_is_configured(nursery, base, disk, tmp_path):
    checkpoints = on(disk, tmp_path / "run")
    settings = trial("run", checkpoint={"on_failure": "continue"})
    text = error_of(nursery, tmp_path, settings, fault="full_at_the_end")
    assert text.startswith(f"{checkpoints / NAMES[STEPS]}: cannot be written: ")
    assert [why_unusable(checkpoints / NAMES[step]) for step in (4, 6)] == [None, None]
    (disk / BALLAST).unlink()
    ended = nursery.start([settings], tmp_path, tmp_path / "log_again")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log_again")
    assert compare(base / "whole", tmp_path / "run") == []


def test_a_budget_counts_what_is_kept_what_is_written_and_the_export(nursery, base, tmp_path):
    checkpoint = base / "first" / "checkpoints" / NAMES[2]
    index = read_index(checkpoint)
    new = sum(entry.elements * TYPE_BYTES[entry.dtype] for entry in index.values())
    export = sum(4 * e.elements for key, e in index.items() if key.startswith(("model/weight", "model/buffer")))
    needed = bytes_of(checkpoint) + len(f"{NAMES[2]}\n") + new + export  # at step 4, with ``latest``
    one = trial("one", checkpoint={"max_bytes": needed + 1000, "keep": 1})
    two = trial("two", checkpoint={"max_bytes": needed + 1000, "keep": 2})
    short = trial("short", checkpoint={"max_bytes": needed - 1, "keep": 1})
    error_of(nursery, tmp_path, one, short, log="log_short")
    assert (names(tmp_path / "one"), names(tmp_path / "short")) == ([NAMES[STEPS]], [NAMES[2]])
    text = error_of(nursery, tmp_path, two)
    checkpoints = tmp_path / "two" / "checkpoints"
    assert text.startswith(f"{checkpoints / NAMES[6]}: a checkpoint of {saving._size(new)} beside the ")
    limit = saving._size(needed + 1000)
    assert f"export of {saving._size(export)} exceeds training.checkpoint.max_bytes {limit}; keep fewer" in text
    assert names(tmp_path / "two") == [NAMES[2], NAMES[4]]
    assert (checkpoints / "latest").read_text() == f"{NAMES[4]}\n"
    two["training"]["checkpoint"]["keep"] = 1  # as it says
    ended = nursery.start([two], tmp_path, tmp_path / "log_fewer")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log_fewer")
    assert names(tmp_path / "two") == [NAMES[STEPS]]


def test_the_toys_checkpoint_fits_the_small_disk_and_is_larger_than_what_is_left(base):
    """Else the tests of full disks would show something else."""
    index = read_index(base / "whole" / "checkpoints" / NAMES[STEPS])
    assert sum(entry.elements * TYPE_BYTES[entry.dtype] for entry in index.values()) > 4096
    assert 4 * bytes_of(base / "whole" / "checkpoints" / NAMES[STEPS]) < DISK_BYTES


def test_a_status_for_which_there_is_no_room_names_its_file_and_leaves_the_one_before(disk):
    run = Run(disk)
    run.update_status(kind="toy", step=3)
    fill(disk, 0)
    with pytest.raises(OSError, match="No space left on device") as error:
        run.update_status(step=4)
    assert error.value.filename == str(run.status_path)
    assert run.status().step == 3
    assert files(disk) == {"status.json", BALLAST}
