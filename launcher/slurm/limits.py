"""What the cluster has, and whether a job fits: asked before anything is submitted, since SLURM accepts jobs that no
node can ever run and keeps them waiting."""

import re
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipeline.errors import UserError
from launcher.slurm.queue import TIMEOUT_S, ask

# sbatch --test-only says this also where nodes are down or drained, which a job may wait for.
OF_THE_NODES = "Requested node configuration is not available"
TIME = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")


class Node(NamedTuple):
    name: str
    cpus: int
    memory_mb: int
    gpus: int


class Partition(NamedTuple):
    """``minutes``: the longest time limit a job may have there; None where there is none."""

    minutes: float | None
    nodes: tuple[Node, ...]


class Limits(NamedTuple):
    partitions: dict[str, Partition]
    default: str | None


def limits() -> Limits:
    return read_limits(ask("sinfo", "--all", "--noheader", "--Node", "--format=%N|%P|%c|%m|%l|%G"))


def read_limits(rows: str) -> Limits:
    """From sinfo's rows: node|partition (the default one with a star)|CPUs|MB|time limit|GRES."""
    nodes: dict[str, list[Node]] = {}
    minutes: dict[str, float | None] = {}
    default = None
    for row in rows.splitlines():
        name, partition, cpus, memory, limit, gres = row.split("|", 5)
        default = partition[:-1] if partition.endswith("*") else default
        partition = partition.removesuffix("*")
        node = Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), _gpus(gres))
        nodes.setdefault(partition, []).append(node)
        minutes[partition] = _minutes(limit)
    return Limits({name: Partition(minutes[name], tuple(nodes[name])) for name in nodes}, default)


def _minutes(limit: str) -> float | None:
    """Of SLURM's [[D-]HH:]MM:SS; None for ``infinite``."""
    if (found := TIME.fullmatch(limit)) is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def refusal(asked: Mapping[str, Any], script: str, limits: Limits) -> str | None:
    """Why a job that asks for this (submitit's parameters) in its batch script would never start; None if it can.

    It is SLURM that decides; only what it says of nodes and partitions is put in better words, and limits of time,
    which it lets a job wait behind for ever, are looked at here."""
    asked = {**asked, **{name.replace("-", "_"): v for name, v in asked.get("additional_parameters", {}).items()}}
    if said := objection(script):
        why = misfit(asked, limits)
        return why or (None if said == OF_THE_NODES else said)
    return too_long(asked, limits)


def misfit(asked: Mapping[str, Any], limits: Limits) -> str | None:
    """What of it no node has, or too few; None where there are such nodes, be they up or down."""
    there = ", ".join(limits.partitions)
    names = _partitions(asked, limits)
    if not names:
        return f"the cluster has no default partition: give `partition` in its profile; there are: {there}"
    if unknown := [name for name in names if name not in limits.partitions]:
        return f"the cluster has no partition {unknown[0]!r}; there are: {there} (`partition` in its profile)"
    reasons = [_misfit_in(name, asked, limits.partitions[name]) for name in names]
    return None if None in reasons else reasons[0]


def too_long(asked: Mapping[str, Any], limits: Limits) -> str | None:
    """Where every partition that it may use gives a job less time."""
    longest = {
        name: limits.partitions[name].minutes for name in _partitions(asked, limits) if name in limits.partitions
    }
    if not longest or None in longest.values() or not isinstance(asked.get("time"), int):
        return None
    name = max(longest, key=longest.get)
    if asked["time"] <= longest[name]:
        return None
    return (
        f"it asks for {asked['time']} minutes, and partition {name!r} gives {longest[name]:g} at most (resources.time, "
        "or time of the profile)"
    )


def _partitions(asked: Mapping[str, Any], limits: Limits) -> list[str]:
    return [name for name in str(asked.get("partition") or limits.default or "").split(",") if name]


def _misfit_in(name: str, asked: Mapping[str, Any], partition: Partition) -> str | None:
    nodes, ranks, cpus = (asked.get(key) or 1 for key in ("nodes", "ntasks_per_node", "cpus_per_task"))
    gpus = _gpus(f"gpu:{asked['gpus_per_node']}" if asked.get("gpus_per_node") else str(asked.get("gres", "")))
    wanted = {
        "cpus": (ranks * cpus, f"{ranks * cpus} CPUs", "resources.threads, or cpus_per_rank of the profile"),
        "memory_mb": (_megabytes(asked.get("mem")), str(asked.get("mem")), "resources.memory_gb, or memory_gb there"),
        "gpus": (gpus, f"{gpus} GPUs", "gpus_per_node there"),
    }
    for field, (need, words, where) in wanted.items():
        most = max(getattr(node, field) for node in partition.nodes)
        if need > most:
            unit = {"cpus": " CPUs", "memory_mb": "M", "gpus": " GPUs"}[field]
            return f"it asks for {words} on a node, and the largest of partition {name!r} has {most}{unit} ({where})"
    fitting = [node for node in partition.nodes if all(getattr(node, f) >= need for f, (need, *_) in wanted.items())]
    if nodes > len(fitting):
        kind = "nodes" if len(fitting) == len(partition.nodes) else "such nodes"
        return f"it asks for {nodes} nodes, and partition {name!r} has {len(fitting)} {kind} (resources.nodes)"
    return None


def _gpus(gres: str) -> int:
    """Of ``gpu:8``, ``gpu:a100:8(S:0-1),lustre:1``; 0 of ``(null)``."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def _megabytes(memory: str | None) -> float:
    match = re.fullmatch(r"([\d.]+)([KMGT]?)B?", memory or "0")
    return float(match[1]) * {"K": 2**-10, "M": 1, "": 1, "G": 2**10, "T": 2**20}[match[2]] if match else 0


def objection(script: str) -> str | None:
    """What sbatch has against a batch script: its account, qos, constraint, any option."""
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer from SLURM's controller in {TIMEOUT_S:g} s; try again") from None
    if asked.returncode == 0:
        return None
    lines = [re.sub(r"^(sbatch: error|allocation failure): ", "", line) for line in asked.stderr.splitlines()]
    return "; ".join(dict.fromkeys(lines)) or f"sbatch --test-only ended with {asked.returncode}"
