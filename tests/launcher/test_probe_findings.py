"""What `stpredict doctor --cluster` says of what the ranks measured."""

import pytest

from launcher.probe.facts import Disk, RankFacts, Transfer
from launcher.probe.findings import Expected, judge

TWO_NODES = Expected(nodes=2, ranks=4, gpus=2, slurm=True, signal_delay_s=100)


def healthy() -> list[RankFacts]:
    """Two ranks on each of two nodes with two GPUs."""
    hosts = ["a", "a", "b", "b"]
    return [
        RankFacts(
            rank=rank,
            stage="done",
            host=host,
            local_rank=rank % 2,
            python="3.11",
            executable="python",
            code="/code",
            cpus=8,
            versions={"torch": "2.13", "driver": "570"},
            gpus=["A100", "A100"],
            backend="nccl",
            hosts=hosts,
            transfers=[Transfer(bytes=2**24, seconds=1e-3, bus_bandwidth=25e9)],
            clock_s=None if rank % 2 else 1e-4 * rank,
            clock_error_s=None if rank % 2 else 5e-5,
            disk=None if rank % 2 else Disk(free=10**12, write=2e9, read=3e9),
            nodes_seen=["a", "b"],
            signal="SIGUSR2",
            packages=[] if rank % 2 else [("decord", "ok", "0.6.0")],
        )
        for rank, host in enumerate(hosts)
    ]


def findings(ranks, expected=TWO_NODES):
    return {finding.name: finding for finding in judge(expected, ranks)}


def test_where_all_is_well_nothing_else_is_said():
    found = findings(healthy())
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["ranks"].detail == "4 on a, b see each other (nccl)"
    assert found["all-reduce of 16 MiB"].detail == "1 ms, 25 GB/s of bus bandwidth"
    assert "write 400 GB" in found["disk"].detail  # two nodes, 2 GB/s each, 100 s


# What is changed in one rank, and what is then said: name, state, words of the detail, words of the advice.
BROKEN = {
    "another torch": (
        {"versions": {"torch": "2.12", "driver": "570"}},
        ("version of torch", "failed", "2.13 on a, b; 2.12 on b", "one environment"),
    ),
    "another driver": (
        {"versions": {"torch": "2.13", "driver": "580"}},
        ("version of driver", "warning", "570 on a, b; 580 on b", ""),
    ),
    "no GPU seen": ({"gpus": []}, ("GPUs", "failed", "sees none on b", "nvidia-smi")),
    "its own GPU only": (
        {"gpus": ["A100"], "visible": "1"},
        ("GPUs", "failed", "rank 3 sees 1 (CUDA_VISIBLE_DEVICES=1) and would take number 1", "gpus-per-task"),
    ),
    "a clock that is seconds off": (
        {"clock_s": 3.0, "clock_error_s": 1e-3},
        ("clocks", "warning", "b is +3.0 s from a", "NTP"),
    ),
    "a clock that is minutes off": (
        {"clock_s": -300.0, "clock_error_s": 1e-3},
        ("clocks", "failed", "b is -300.0 s from a", "munge"),
    ),
    "a folder of its own": ({"nodes_seen": ["b"]}, ("folder", "failed", "b does not see what a wrote", "share")),
    "a slow disk": (
        {"disk": Disk(free=10**12, write=5e6, read=1e9)},
        ("disk", "warning", "5 MB/s written", "checkpoint"),
    ),
    "a full disk": ({"disk": Disk(free=10**9, write=2e9, read=2e9)}, ("room", "warning", "1 GB free", "make room")),
    "no warning": ({"signal": None}, ("warning signal", "failed", "nothing came to rank 3 on b", "pass SIGUSR2 on")),
    "no scontrol": ({"scontrol": "not there"}, ("scontrol", "warning", "not there on b", "batch script")),
    "ranks that are alone": ({"hosts": ["b"]}, ("ranks", "failed", "do not see the same ranks", "NCCL_SOCKET_IFNAME")),
    "a hang among collectives": (
        {"stage": "bandwidth"},
        ("rank 3", "failed", "b: ended while measuring bandwidth", "NCCL_IB_DISABLE"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_on_one_node_is_said_with_the_node_and_what_to_do(case):
    changes, (name, state, detail, advice) = BROKEN[case]
    ranks = healthy()
    ranks[3] = ranks[3].model_copy(update=changes)
    finding = findings(ranks)[name]
    assert finding.state == state
    assert detail in finding.detail
    assert advice in finding.advice


def test_a_rank_that_never_wrote_is_named():
    found = findings(healthy()[:3])
    assert (found["rank 3"].state, found["rank 3"].detail) == ("failed", "wrote nothing")


def test_gpus_between_nodes_over_ethernet_are_noticed():
    ranks = healthy()
    for facts in ranks:
        facts.transfers = [Transfer(bytes=2**24, seconds=1e-2, bus_bandwidth=1e9)]
    assert "NET/Socket" in findings(ranks)["network"].advice


def test_a_package_that_one_node_lacks_is_said_of_that_node():
    ranks = healthy()
    ranks[2].packages = [("decord", "failed", "not installed")]
    found = judge(TWO_NODES, ranks)
    assert [(f.state, f.detail) for f in found if f.name == "decord"] == [
        ("failed", "b: not installed"),
        ("ok", "a: 0.6.0"),
    ]
