"""Pipelines are submitted whole or not at all, and what cannot run is refused before."""

import json
import os
import shutil
from pathlib import Path

import pytest

from launcher.record import PipelineRun
from tests.slurm.small_pipeline import Small

pytestmark = pytest.mark.slurm


@pytest.fixture
def small(slurm, tmp_path) -> Small:
    return Small(slurm, tmp_path)


@pytest.fixture(scope="module")
def done(slurm, tmp_path_factory):
    """A small pipeline that ran to its end here, without SLURM."""
    made = Small(slurm, tmp_path_factory.mktemp("done"))
    ran = made.launch(here=True)
    assert ran.returncode == 0, ran.stderr
    return made


# The array, its merge and the report are the three that sbatch is asked to submit; --test-only asks for nothing.
THIRD_FAILS = """
[[ $1 = --test-only ]] && exec $real "$@"
echo x >> $0.calls; (($(wc -l < $0.calls) < 3)) && exec $real "$@"
"""


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (
            {"sbatch": f"{THIRD_FAILS} echo 'sbatch: error: Batch job submission failed: no' >&2; exit 1"},
            "job 'report'",
        ),
        ({"sbatch": f"{THIRD_FAILS} kill -INT $PPID; exec $real $@"}, "interrupted; nothing was submitted"),
        ({"sbatch": f"{THIRD_FAILS} kill -TERM $PPID; exec $real $@"}, "interrupted; nothing was submitted"),
        ({"sbatch": f"{THIRD_FAILS} $real $@ >/dev/null; echo 'sbatch: error: timed out' >&2; exit 1"}, "timed out"),
        ({"scontrol": "[[ $1 = release ]] || exec $real $@; echo scontrol: no >&2; exit 1"}, "scontrol: no"),
    ],
    ids=["refused", "interrupted", "terminated", "answer-lost", "not-released"],
)
def test_what_fails_on_the_way_leaves_no_job_and_every_file_as_it_was(done, tools, says):
    for name, script in tools.items():
        done.tool(name, script)
    before = done.tree()
    try:
        failed = done.launch("--rerun", "shards")
    finally:
        shutil.rmtree(done.tools)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    assert says in failed.stderr
    assert "nothing was submitted" in failed.stderr
    assert done.queued() == []
    assert done.tree() == before


def test_what_is_done_is_waited_for_by_nothing(done):
    shown = json.loads(done.launch("--rerun", "report", "--dry-run", "--json").stdout)
    assert [(row["job"], row["action"]) for row in shown["jobs"]] == [("shards", "skip"), ("report", "rerun")]
    assert list(shown["scripts"]) == ["report"]
    assert "--dependency" not in shown["scripts"]["report"]
    shown = json.loads(done.launch("--rerun", "shards", "--dry-run", "--json").stdout)
    assert list(shown["scripts"]) == ["shards", "shards.merge", "report"]  # though all of its parts are there


def test_a_dry_run_writes_nothing_and_prints_the_scripts_that_are_then_submitted(small):
    dry = small.launch("--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert not small.run.exists()
    shown = json.loads(dry.stdout)
    assert [(row["job"], row["action"], row["array"]) for row in shown["jobs"]] == [
        ("shards", "run", 2),
        ("report", "run", None),
    ]
    launched = small.launch("--json")
    assert launched.returncode == 0, launched.stderr
    ids, scripts = {}, {}
    for name, job in json.loads(launched.stdout)["jobs"].items():
        for one in job["submitted"]:
            which = f"{name}.merge" if one["merge"] else name
            ids[f"<id of {which}>"] = one["slurm_id"].partition("_")[0]
            scripts[which] = Path(one["script"]).read_text()
    small.slurm.run("scancel", *ids.values())
    for which, script in shown["scripts"].items():
        for name, id in ids.items():
            script = script.replace(f"afterok:{name}", f"afterok:{id}")
        # Only what holds a space is in quotes.
        assert script.replace("'", "") == scripts[which].replace("'", ""), which
    assert shown["scripts"].keys() == scripts.keys() == {"shards", "shards.merge", "report"}


def test_what_a_killed_launch_left_held_is_cancelled_by_the_next_one(small):
    small.tool("sbatch", f"{THIRD_FAILS} kill -KILL $PPID")
    small.launch()
    shutil.rmtree(small.tools)
    left = {line.split()[0] for line in small.queued()}
    assert len(left) == 2
    assert small.launch().returncode == 0
    now = {line.split()[0] for line in small.queued()}
    assert not left & now
    small.slurm.run("scancel", *PipelineRun(small.run).record().slurm_ids())


def test_jobs_that_could_not_even_be_cancelled_are_named(small):
    small.tool("scontrol", "[[ $1 = release ]] || exec $real $@; exit 1")
    small.tool("scancel", "exit 1")
    failed = small.launch()
    shutil.rmtree(small.tools)
    assert failed.returncode == 1
    left = failed.stderr.rpartition("scancel ")[2].split()
    assert len(left) == 3
    assert len(small.queued()) >= 3
    small.slurm.run("scancel", *left)
    small.slurm.wait_for(lambda: small.queued() == [])


@pytest.fixture
def little_disk(small):
    """``small``, whose run lies on a file system of 8 MB; and what leaves so many blocks free there."""
    small.run.mkdir()
    small.slurm.run("mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(small.run))

    def leave(blocks: int) -> None:
        filler = small.run / "launcher" / "filler"
        filler.parent.mkdir(exist_ok=True)
        filler.unlink(missing_ok=True)
        disk = os.statvfs(small.run)
        filler.write_bytes(bytes((disk.f_bfree - blocks) * disk.f_frsize))

    yield small, leave
    small.slurm.run("umount", "--lazy", str(small.run))


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system: needs root")
def test_wherever_on_the_way_the_disk_is_full_that_is_said_and_nothing_is_left(little_disk, done):
    small, leave = little_disk
    failures = 0
    for blocks in (0, 40, None, *range(0, 60, 3)):
        if blocks is None:  # the copy of the code is there from now on
            (small.run / "launcher" / "filler").unlink()
            shutil.copytree(PipelineRun(done.run).code, PipelineRun(small.run).code, dirs_exist_ok=True)
            continue
        leave(blocks)
        before = small.tree()
        launched = small.launch()
        if launched.returncode == 0:
            break
        assert (launched.returncode, launched.stderr.count("\n")) == (1, 1), launched.stderr
        assert "no space left on the device; nothing was launched: make room" in launched.stderr
        assert small.queued() == []
        assert small.tree() == before
        failures += 1
    small.slurm.run("scancel", *PipelineRun(small.run).record().slurm_ids())
    small.slurm.wait_for(lambda: small.queued() == [])
    assert failures > 4


@pytest.mark.parametrize(
    ("profile", "job", "says"),
    [
        ({"partition": "nope"}, {}, "job 'shards': the cluster has no partition 'nope'; there are: all"),
        ({"kinds": {"report": {"partition": "nope"}}}, {}, "job 'report': the cluster has no partition 'nope'"),
        ({"cpus_per_rank": 99}, {}, "it asks for 99 CPUs on a node, and the largest of partition 'all' has 8 CPUs"),
        ({"memory_gb": 999}, {}, "it asks for 1022976M on a node, and the largest of partition 'all' has"),
        ({"gpus_per_node": 2}, {}, "it asks for 1 GPUs on a node, and the largest of partition 'all' has 0 GPUs"),
        ({}, {"nodes": 3, "processes": 3}, "it asks for 3 nodes, and partition 'all' has 2 nodes (resources.nodes)"),
        ({}, {"nodes": 2, "processes": 3}, "3 processes do not spread evenly over 2 nodes"),
        ({}, {"nodes": 1, "processes": 2}, "a node of this cluster takes 1"),
        ({"constraint": "fast"}, {}, "Invalid feature specification"),
        ({"options": {"licenses": "none:1"}}, {}, "Invalid license specification"),
        (
            {"time": "00:01:00", "signal_delay_s": 60},
            {},
            "time limit is 00:01:00, and it is told to save 60 s before",
        ),
        ({"time": 86400}, {}, "86400 is no time limit; write HH:MM:SS or D-HH:MM:SS, in quotes"),
    ],
)
def test_what_can_never_run_is_refused_in_one_line_before_anything_is_written(small, profile, job, says):
    small.data["jobs"]["report"]["set"]["resources"] = job
    refused = small.launch(profile=profile)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert says in refused.stderr
    assert not small.run.exists()
    assert small.queued() == []


def test_a_run_whose_path_slurm_would_take_for_a_pattern_is_refused(small):
    refused = small.launch(f"run={small.folder / 'half%noise'}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "half%noise: SLURM takes % in a log's path for a pattern" in refused.stderr
    assert not (small.folder / "half%noise").exists()


def test_a_time_above_the_partitions_limit_is_refused(small):
    small.slurm.run("scontrol", "create", "PartitionName=short", "Nodes=ALL", "MaxTime=00:05:00")
    try:
        refused = small.launch(profile={"partition": "short", "time": "01:00:00"})
        assert refused.returncode == 2
        assert "it asks for 60 minutes, and partition 'short' gives 5 at most" in refused.stderr
    finally:
        small.slurm.run("scontrol", "delete", "PartitionName=short")


def test_nodes_that_are_down_may_be_waited_for(small):
    small.slurm.run("scontrol", "update", "NodeName=one-b", "State=DRAIN", "Reason=test")
    try:
        small.data["jobs"]["report"]["set"]["resources"] = {"nodes": 2, "processes": 2}
        launched = small.launch()
        assert launched.returncode == 0, launched.stderr
        small.slurm.run("scancel", *PipelineRun(small.run).record().slurm_ids())
    finally:
        small.slurm.run("scontrol", "update", "NodeName=one-b", "State=RESUME")


def test_without_slurm_and_with_a_controller_that_does_not_answer_one_line_says_so(small, tmp_path):
    python = str(Path(shutil.which("stpredict", path=small.slurm.environment["PATH"])).parent)
    nowhere = small.launch(environment={"PATH": python})
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert "no SLURM on this machine (not found: sbatch" in nowhere.stderr
    conf = Path(small.slurm.environment["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(conf.replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1 #"))
    silent = small.launch(environment={"SLURM_CONF": str(tmp_path / "slurm.conf")})
    assert (silent.returncode, silent.stderr.count("\n")) == (1, 1)
    assert "Unable to contact slurm controller" in silent.stderr
    assert not small.run.exists()
