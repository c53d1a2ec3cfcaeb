"""From what the ranks measured to what a person is told: what works, what does not, and what to do about it.

Torch-free. The bounds are rules of thumb, not measurements: they tell a network that is used from one that is not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from launcher.doctor import GB, Finding
from launcher.probe.facts import DOING, RankFacts, Stage

CLOCK_WARNING_S, CLOCK_FAILED_S = 1.0, 60.0
SLOW_BETWEEN_NODES = 5 * GB  # bus bandwidth of GPUs, bytes/s: InfiniBand gives several times that, Ethernet less
SLOW_DISK = 0.1 * GB
LITTLE_DISK = 10 * GB
HARMLESS_VERSIONS = {"kernel", "driver", "flash-attn", "xformers"}
NETWORK = "name the interface in the profile's environment: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME (ip -br addr there)"
STUCK: dict[Stage, str] = {
    "started": "Python, torch or its CUDA do not start there; its log says why",
    "meeting": f"nodes do not reach each other; their names must resolve on all nodes and ports be open, or {NETWORK}",
    "bandwidth": "collectives hang or fail; NCCL_DEBUG: INFO in the profile's environment says over what, "
    "NCCL_IB_DISABLE: '1' and NCCL_P2P_DISABLE: '1' whether InfiniBand or the links within a node are to blame",
    "clocks": f"gloo does not get through; {NETWORK}",
    "disk": "the folder of --run must be one that all nodes share and may write to; in a container it must be mounted",
    "signal": "its log says why",
    "packages": "its log says why; where files of an Apptainer image vanished, the warning signal ended the process "
    "that serves the .sif (squashfuse_ll): unpack the image (docs/cluster.md)",
}


@dataclass(frozen=True)
class Expected:
    """What was asked for. ``gpus`` are those of a node; ``slurm`` whether SLURM started the ranks."""

    nodes: int
    ranks: int
    gpus: int
    slurm: bool
    signal_delay_s: int


def judge(expected: Expected, ranks: Sequence[RankFacts]) -> list[Finding]:
    """The findings about a probe of which ``ranks`` is all that was written."""
    if stuck := _stuck(expected, ranks):
        return stuck
    checks: Iterable[Callable[[], Iterable[Finding]]] = (
        lambda: _ranks(expected, ranks),
        lambda: _versions(ranks),
        lambda: _gpus(expected, ranks),
        lambda: _bandwidth(ranks),
        lambda: _clocks(ranks),
        lambda: _disk(expected, ranks),
        lambda: _signals(expected, ranks),
        lambda: _scontrol(expected, ranks),
        lambda: _packages(ranks),
    )
    return [finding for check in checks for finding in check()]


def _stuck(expected: Expected, ranks: Sequence[RankFacts]) -> list[Finding]:
    there = {facts.rank for facts in ranks}
    found = [
        Finding(
            f"rank {rank}", "failed", "wrote nothing", STUCK["started"] + "; the folder of --run must be seen there"
        )
        for rank in range(expected.ranks)
        if rank not in there
    ]
    behind = [facts for facts in ranks if facts.stage != "done"]
    for facts in behind:
        advice = STUCK[facts.stage] if facts is behind[0] or facts.stage != behind[0].stage else ""
        found.append(Finding(f"rank {facts.rank}", "failed", f"{facts.host}: ended while {DOING[facts.stage]}", advice))
    return found


def _ranks(expected: Expected, ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    hosts = list(dict.fromkeys(facts.host for facts in ranks))
    detail = f"{len(ranks)} on {_nodes(hosts)} see each other ({ranks[0].backend})"
    agree = all(facts.hosts == ranks[0].hosts and len(facts.hosts) == len(ranks) for facts in ranks)
    if not agree:
        yield Finding("ranks", "failed", "do not see the same ranks", NETWORK)
    elif len(hosts) != expected.nodes:
        yield Finding(
            "ranks",
            "failed",
            f"{detail}; asked for {expected.nodes} nodes",
            "options of the profile spread them otherwise",
        )
    else:
        yield Finding("ranks", "ok", detail)


def _versions(ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    names = dict.fromkeys(name for facts in ranks for name in facts.versions)
    same = []
    for name in names:
        by_version: dict[str, list[str]] = defaultdict(list)
        for facts in ranks:
            version = facts.versions.get(name, "none")
            if facts.host not in by_version[version]:
                by_version[version].append(facts.host)
        if len(by_version) == 1:
            same.append(f"{name} {next(iter(by_version))}")
            continue
        detail = "; ".join(f"{version} on {_nodes(hosts)}" for version, hosts in by_version.items())
        state = "warning" if name in HARMLESS_VERSIONS else "failed"
        advice = "" if state == "warning" else "use one environment on a file system that all nodes share, or one image"
        yield Finding(f"version of {name}", state, detail, advice)
    yield Finding("versions", "ok", ", ".join(same))


def _gpus(expected: Expected, ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    if not expected.gpus:
        unasked = f"{len(ranks[0].gpus)} seen, none asked for: gpus_per_node" if ranks[0].gpus else "none asked for"
        yield Finding("GPUs", "ok", unasked)
        return
    blind = [facts for facts in ranks if not facts.gpus]
    narrow = [facts for facts in ranks if facts.gpus and len(facts.gpus) <= facts.local_rank]
    few = [facts for facts in ranks if facts.gpus and len(facts.gpus) < expected.gpus and facts not in narrow]
    if blind:
        yield Finding(
            "GPUs", "failed", f"torch sees none on {_nodes([facts.host for facts in blind])}",
            "a CUDA build of torch, a driver at least as new, and in a container --nv (Apptainer) are needed; "
            "nvidia-smi on the node tells whether SLURM gave any",
        )  # fmt: skip
    if narrow:
        yield Finding(
            "GPUs", "failed", f"rank {narrow[0].rank} sees {len(narrow[0].gpus)} (CUDA_VISIBLE_DEVICES="
            f"{narrow[0].visible}) and would take number {narrow[0].local_rank}",
            "every rank has to see all GPUs of its node: no gpus-per-task or gpu-bind in the profile's options",
        )  # fmt: skip
    if few:
        yield Finding(
            "GPUs", "warning", f"{len(few[0].gpus)} of {expected.gpus} on {_nodes([facts.host for facts in few])}"
        )
    if not (blind or narrow or few):
        kinds = ", ".join(dict.fromkeys(name for facts in ranks for name in facts.gpus))
        yield Finding("GPUs", "ok", f"{len(ranks[0].gpus)} for each rank: {kinds}")


def _bandwidth(ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    if len(ranks) == 1:
        yield Finding("all-reduce", "ok", "one rank: nothing to measure")
        return
    for transfer in ranks[0].transfers:
        detail = f"{transfer.seconds * 1e3:.3g} ms, {transfer.bus_bandwidth / GB:.3g} GB/s of bus bandwidth"
        yield Finding(f"all-reduce of {_size(transfer.bytes)}", "ok", detail)
    between = len(set(ranks[0].hosts)) > 1 and ranks[0].backend == "nccl"
    best = max(transfer.bus_bandwidth for transfer in ranks[0].transfers)
    if between and best < SLOW_BETWEEN_NODES:
        yield Finding(
            "network", "warning", f"{best / GB:.3g} GB/s between nodes is little for GPUs",
            "NCCL_DEBUG: INFO in the profile's environment shows NET/IB where InfiniBand is used and NET/Socket where "
            "it is not; NCCL_IB_HCA names the cards",
        )  # fmt: skip


def _clocks(ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    offsets = [facts for facts in ranks if facts.clock_s is not None]
    if len(offsets) < 2:
        yield Finding("clocks", "ok", "one node: nothing to compare")
        return
    worst = max(offsets, key=lambda facts: abs(facts.clock_s))
    spread = max(f.clock_s for f in offsets) - min(f.clock_s for f in offsets)
    error = max(facts.clock_error_s for facts in offsets)
    detail = f"at most {spread * 1e3:.3g} ms apart (measured to ± {error * 1e3:.2g} ms)"
    if spread < CLOCK_WARNING_S:
        yield Finding("clocks", "ok", detail)
        return
    state = "failed" if spread >= CLOCK_FAILED_S else "warning"
    detail = f"{detail}; {worst.host} is {worst.clock_s:+.1f} s from {ranks[0].host}"
    yield Finding(
        "clocks", state, detail, "have them set by NTP: munge refuses jobs of nodes minutes apart, heartbeats lie"
    )


def _disk(expected: Expected, ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    hosts = sorted({facts.host for facts in ranks})
    partial = [facts for facts in ranks if facts.nodes_seen != hosts]
    if partial:
        missing = sorted(set(hosts) - set(partial[0].nodes_seen))
        yield Finding("folder", "failed", f"{partial[0].host} does not see what {_nodes(missing)} wrote", STUCK["disk"])
    else:
        yield Finding("folder", "ok", f"the same on {_nodes(hosts)}")
    disks = {facts.host: facts.disk for facts in ranks if facts.disk}
    slowest = min(disks, key=lambda host: min(disks[host].write, disks[host].read))
    write, read, free = disks[slowest].write, disks[slowest].read, min(disk.free for disk in disks.values())
    saved = sum(disk.write for disk in disks.values()) * expected.signal_delay_s
    detail = f"{write / 1e6:,.0f} MB/s written, {read / 1e6:,.0f} MB/s read by a node (the slowest of {len(disks)})"
    if expected.slurm:
        detail += f"; within the signal delay of {expected.signal_delay_s} s all of them write {saved / GB:,.0f} GB"
    slow = min(write, read) < SLOW_DISK
    advice = "a checkpoint takes long at that: another file system for --run and the pipelines' `run`" if slow else ""
    yield Finding("disk", "warning" if slow else "ok", detail, advice)
    state, advice = ("ok", "") if free > LITTLE_DISK else ("warning", "make room, or give pipelines another `run`")
    yield Finding("room", state, f"{free / GB:,.0f} GB free", advice)


def _signals(expected: Expected, ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    wanted = "SIGUSR2"
    deaf = [facts for facts in ranks if facts.signal != wanted]
    if deaf:
        came = f"{deaf[0].signal} came to" if deaf[0].signal else "nothing came to"
        yield Finding(
            "warning signal", "failed", f"{came} {', '.join(f'rank {f.rank} on {f.host}' for f in deaf)}",
            "without it no job saves before its time limit; whatever starts the ranks (a wrapper, a container) must "
            "pass SIGUSR2 on",
        )  # fmt: skip
    else:
        yield Finding("warning signal", "ok", "came to every rank")


def _scontrol(expected: Expected, ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    if not expected.slurm:
        return
    without = [facts for facts in ranks if facts.scontrol]
    if without:
        yield Finding(
            "scontrol", "warning",
            f"{without[0].scontrol} on {_nodes([facts.host for facts in without])}: ranks cannot requeue their job",
            "the batch script does it in their place where it has scontrol; in a container nothing else is needed",
        )  # fmt: skip
    else:
        yield Finding("scontrol", "ok", "answers to every rank: jobs requeue themselves")


def _packages(ranks: Sequence[RankFacts]) -> Iterable[Finding]:
    """One line for each thing that all nodes agree about, one for each node where they do not. What is this machine's
    own, such as its memory, is given for the first."""
    order = {"ok": 0, "missing": 1, "failed": 2}
    by_name: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for facts in ranks:
        for name, state, detail in facts.packages:
            if name not in ("SLURM", "disk"):
                by_name[name].append((facts.host, state, detail))
    for name, found in by_name.items():
        if len({state for _, state, _ in found}) == 1:
            host, state, detail = found[0]
            yield Finding(name, state, detail)
            continue
        for host, state, detail in sorted(found, key=lambda entry: -order[entry[1]]):
            yield Finding(name, state, f"{host}: {detail}", "nodes differ" if order[state] else "")


def _nodes(hosts: Iterable[str]) -> str:
    hosts = list(dict.fromkeys(hosts))
    return ", ".join(hosts) if len(hosts) <= 4 else f"{', '.join(hosts[:3])} and {len(hosts) - 3} more"


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
