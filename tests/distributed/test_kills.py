"""SIGKILL at chosen and at random moments: 5 here, 25 by ``make prove`` (benchmarks/results/kills.md)."""

import shutil

import pytest

from tests.distributed.kills import CONFIGS, POINTS, Kill, Proof, compare, proof

BF16, FP32 = CONFIGS


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    with proof(tmp_path_factory.mktemp("kills")) as proven:
        yield proven


def point(text: str):
    return next(point for point in POINTS if point.text == text)


KILLS = [
    (Kill(0, FP32, "rank 1", point("half of a rank's file written"), 0), "step_00000002", ["step_00000004"]),
    (Kill(1, FP32, "all", point("between state and index and the marker"), 0), "step_00000004", ["step_00000006"]),
    (Kill(2, BF16, "rank 0", point("between the marker and latest"), 0), "step_00000003", []),
]


@pytest.mark.parametrize(("kill", "found", "skipped"), KILLS, ids=[kill.point.text for kill, *_ in KILLS])
def test_a_killed_run_continues_from_a_complete_checkpoint_and_ends_as_if_nothing_had_happened(
    proven: Proof, kill, found, skipped
):
    outcome = proven.run(kill)
    assert outcome.differences == []
    assert -9 in outcome.signals
    assert (outcome.found, outcome.skipped) == (found, skipped)


def test_so_does_one_killed_while_it_continues(proven: Proof):
    outcome = proven.run(Kill(3, FP32, "all", point("in a resume, half of the state set"), 0))
    assert outcome.differences == []
    assert outcome.signals == [-9, -9]
    assert outcome.found in ("step_00000002", "step_00000004")  # still there


def test_so_does_one_killed_at_a_random_moment(proven: Proof):
    outcome = proven.run(Kill(4, BF16, "all", None, 0.5))
    assert outcome.differences == []
    assert outcome.signals == [-9, -9]


def test_what_compares_runs_sees_a_bit_a_missing_file_and_a_metric(proven: Proof, tmp_path):
    """Else the proofs above would prove nothing."""
    whole, _ = proven.reference(FP32)
    newest = "step_00000010"
    for number, change in enumerate((flip, lambda path: path.unlink())):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        change(copy / "checkpoints" / newest / "rank_00001.safetensors")
        assert f"{newest}/rank_00001.safetensors" in compare(whole, copy)[0]
    copy = tmp_path / "metrics"
    shutil.copytree(whole, copy)
    rows = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(rows.replace('"l2": ', '"l2": 1', 1))
    assert compare(whole, copy) == ["metrics.jsonl differs"]


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
