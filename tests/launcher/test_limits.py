"""What a cluster has, as sinfo says it, and which jobs it can never run."""

import pytest

from launcher.slurm.limits import Node, misfit, read_limits, too_long

ROWS = """\
gpu1|a100*|64|512000|2-00:00:00|gpu:a100:8(S:0-1),lustre:1
gpu2|a100*|64|512000|2-00:00:00|gpu:a100:8(S:0-1)
gpu3|a100*|64|512000|2-00:00:00|gpu:4
cpu1|debug|16|64000|30:00|(null)
cpu1|long|16+|64000+|infinite|(null)
"""


def test_sinfo_is_read():
    found = read_limits(ROWS)
    assert found.default == "a100"
    assert list(found.partitions) == ["a100", "debug", "long"]
    assert found.partitions["a100"].nodes[0] == Node("gpu1", 64, 512000, 8)
    assert [partition.minutes for partition in found.partitions.values()] == [2880, 30, None]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, None),
        ({"nodes": 2, "ntasks_per_node": 8, "cpus_per_task": 8, "gpus_per_node": 8}, None),
        (
            {"ntasks_per_node": 8, "cpus_per_task": 9},
            "it asks for 72 CPUs on a node, and the largest of partition 'a100'",
        ),
        ({"gpus_per_node": "a100:9"}, "it asks for 9 GPUs on a node, and the largest"),
        ({"gres": "gpu:a100:9,lustre:1"}, "it asks for 9 GPUs on a node"),
        ({"nodes": 3, "gpus_per_node": 8}, "3 nodes, and partition 'a100' has 2 such nodes"),
        ({"nodes": 4}, "it asks for 4 nodes, and partition 'a100' has 3 nodes"),
        ({"mem": "512001M"}, "it asks for 512001M on a node, and the largest of partition 'a100' has 512000M"),
        ({"mem": "500G"}, None),
        ({"partition": "debug,a100", "gpus_per_node": 8}, None),
        ({"partition": "gpu"}, "the cluster has no partition 'gpu'; there are: a100, debug, long"),
    ],
)
def test_a_job_fits_or_the_line_says_what_is_too_much(asked, says):
    found = misfit(asked, read_limits(ROWS))
    assert (found is None) if says is None else says in found


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"partition": "debug", "time": 30}, None),
        ({"partition": "debug", "time": 31}, "it asks for 31 minutes, and partition 'debug' gives 30 at most"),
        ({"partition": "debug,long", "time": 31}, None),
        ({"partition": "long", "time": 10**6}, None),
        ({"partition": "debug,a100", "time": 31}, None),
        ({"time": 2881}, "partition 'a100' gives 2880 at most"),
    ],
)
def test_a_time_that_no_partition_gives_is_named(asked, says):
    found = too_long(asked, read_limits(ROWS))
    assert (found is None) if says is None else says in found


def test_without_a_default_partition_one_is_asked_for():
    assert "no default partition: give `partition`" in misfit({}, read_limits(ROWS.replace("*", "")))
