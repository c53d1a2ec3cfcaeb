"""Everything that is estimated of one training, on one machine or on the least that holds it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import UsageError
from stpredict.estimates.disk import Disk, disk_of
from stpredict.estimates.duration import NETWORK_GB_S, Utilization, median_mfu, while_computing
from stpredict.estimates.gpus import DEFAULT, Gpu, all_gpus, find_gpu, short_name
from stpredict.estimates.machine import GPUS_PER_NODE, MARGIN, Machine, gpus_of_a_node, node_counts
from stpredict.estimates.planned import Planned
from stpredict.estimates.recommendation import best, gigabytes, reasons
from stpredict.estimates.size import Size, size_of
from stpredict.estimates.ways import Way, Ways
from stpredict.jobs.config import TrainingJobConfig
from stpredict.run import Run
from stpredict.training.computing import OffloadConfig
from stpredict.training.config import TrainingConfig


@dataclass(frozen=True)
class Asked:
    """What the command line says; None: not said."""

    utilization: Utilization
    gpu: Gpu
    gpu_source: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    network_gb_s: float = NETWORK_GB_S
    tokens: float | None = None
    days: float | None = None


@dataclass(frozen=True)
class Budget:
    """What is trained: ``tokens`` of all steps."""

    steps: int
    tokens: int
    samples: int

    def days(self, step_s: float) -> float:
        return self.steps * step_s / 86400


@dataclass(frozen=True)
class Estimate:
    """``ways`` are on ``machine``: what was asked for, or the least that fits. ``recommended`` is one of them, or None
    where none fits; ``configured`` is the config's own stage, micro-batch
    and policy on it, or None where its batch does not divide so."""

    planned: Planned
    size: Size
    asked: Asked
    budget: Budget
    machine: Machine
    ways: list[Way]
    recommended: Way | None
    configured: Way | None
    disk: Disk
    why: list[str]

    @property
    def without_tokenizer(self) -> bool:
        """One runs in every step that is not known, and not counted."""
        return self.planned.tokenizes and self.planned.tokenizing is None


def this_gpu(name: str | None) -> tuple[Gpu, str]:
    """The one that is meant, and why: asked for, here, or the default."""
    if name is not None:
        return find_gpu(name), "asked for"
    import torch

    if torch.cuda.is_available():
        here = torch.cuda.get_device_name(0)
        try:
            return find_gpu(here), "the one here"
        except UsageError:
            return find_gpu(DEFAULT), f"assumed; the one here, {here}, is not known"
    return find_gpu(DEFAULT), "assumed; --gpu names another"


def budget_of(training: TrainingConfig, size: Size, tokens: float | None) -> Budget:
    """The config's steps, or as many as ``tokens`` take. UsageError where the model has no tokens."""
    of_step = size.tokens * training.batch_size
    if tokens is None:
        steps = training.steps
    elif of_step:
        steps = max(1, round(tokens / of_step))
    else:
        raise UsageError("--tokens: this model has no tokens; give training.steps=N")
    return Budget(steps, steps * of_step, steps * training.batch_size)


def machine_of(config: TrainingJobConfig, asked: Asked) -> Machine:
    """The ranks of its ``resources``, unless the command line says how many nodes."""
    if asked.nodes is not None:
        per_node = gpus_of_a_node(config.training.batch_size, asked.nodes, asked.gpus_per_node)
        return Machine(asked.gpu, asked.nodes, per_node, asked.network_gb_s)
    ranks, at_most = config.resources.processes, asked.gpus_per_node or GPUS_PER_NODE
    nodes = -(-ranks // at_most) if asked.gpus_per_node else config.resources.nodes or -(-ranks // at_most)
    if ranks % nodes:
        raise UsageError(f"{ranks} ranks (resources.processes) do not divide among {nodes} nodes of {at_most} GPUs")
    return Machine(asked.gpu, nodes, ranks // nodes, asked.network_gb_s)


def measured(run: Run, planned: Planned, gpu: Gpu, network_gb_s: float) -> Utilization:
    """By a ``run`` of what is ``planned``, on the GPUs that it ran on, or on such as ``gpu`` where they are not known.
    What it sent and computed again, estimated, is taken out of the MFU that it says. UserError where it says none."""
    mfu = median_mfu(run)
    machine = machine_of(
        planned.config, Asked(Utilization(mfu), _gpu_of(run) or gpu, "measured", network_gb_s=network_gb_s)
    )
    ways = Ways(planned, size_of(planned).flops_forward, Utilization(mfu), with_memory=False)
    time = ways.way(machine, planned.config.training).time
    return Utilization(while_computing(mfu, time, run), "measured", str(run.path), mfu)


def _gpu_of(run: Run) -> Gpu | None:
    try:
        return find_gpu(json.loads(run.environment_path.read_text())["gpus"][0])
    except (FileNotFoundError, IndexError, UsageError):
        return None


def estimate_training(planned: Planned, asked: Asked) -> Estimate:
    """UsageError where the batch does not divide among the ranks that are asked for."""
    training, size = planned.config.training, size_of(planned)
    per_node = gpus_of_a_node(training.batch_size, asked.nodes, asked.gpus_per_node)
    budget = budget_of(training, size, asked.tokens)
    ways_of = Ways(planned, size.flops_forward, asked.utilization)

    def on(nodes: int) -> tuple[Machine, list[Way], Way | None]:
        machine = Machine(asked.gpu, nodes, per_node, asked.network_gb_s)
        ways = ways_of.all(machine)
        return machine, ways, best(ways)

    counts = node_counts(training.batch_size, per_node) if asked.nodes is None else [asked.nodes]
    why: list[str] = []
    for nodes in counts:
        machine, ways, chosen = on(nodes)
        if chosen and (asked.days is None or budget.days(chosen.time.step_s) <= asked.days):
            break
    most = counts[-1] * per_node
    if asked.nodes is None and chosen:
        limit = f"; batch_size {training.batch_size} has samples for {most} ranks at most"
        if asked.days is None:
            fewest = "the fewest that hold it" if machine.nodes > counts[0] else "holds it"
            more = "; more are faster (--nodes N, --days D)" if machine.ranks < most else ""
            why.append(f"{machine}: {fewest}{more}{limit}")
        elif budget.days(chosen.time.step_s) <= asked.days:
            why.append(f"{machine}: the fewest that are done within {asked.days:g} days{limit}")
        else:
            why.append(
                f"{machine}: the most that the batch has samples for, and still more than {asked.days:g} days; "
                "a larger training.batch_size takes more ranks, and is another training"
            )
    if chosen:
        why += reasons(chosen, ways, machine)
    else:
        why += _nothing_fits(ways_of, ways, machine, on)
    try:
        configured = ways_of.way(machine, training)
    except UsageError as error:  # of the micro-batch: the ways have their own
        configured = None
        why.append(f"the config's own settings do not run so: {error}")
    disk = disk_of(planned, training.model_copy(update={"steps": budget.steps}), machine.ranks)
    return Estimate(planned, size, asked, budget, machine, ways, chosen, configured, disk, why)


def _nothing_fits(ways_of: Ways, ways: list[Way], machine: Machine, on) -> list[str]:
    nearest = min(ways, key=lambda way: way.memory.total)
    needed = nearest.memory.total
    policy = "" if nearest.policy == "none" else f", policy {nearest.policy}"
    told = [
        f"nothing fits {machine} of {machine.gpu.name}: the least, ZeRO-{nearest.training.zero_stage}{policy} "
        f"with a micro-batch of 1, takes {needed / 1e9:.1f} GB of {machine.usable_bytes / 1e9:.1f}"
    ]
    training = nearest.training
    for nodes in node_counts(training.batch_size, machine.gpus_per_node):
        if nodes > machine.nodes:
            larger, _, chosen = on(nodes)
            if chosen:
                told.append(f"nearest that would: {larger}")
                break
    able = [gpu for gpu in all_gpus() if gpu.tflops(training.precision)]
    enough = [gpu for gpu in able if (1 - MARGIN) * gpu.memory_bytes >= needed]
    if enough:
        least = min(enough, key=lambda gpu: gpu.memory_gib)
        told.append(f"or GPUs with {least.memory_gib:g} GiB (--gpu {short_name(least)})")
    if training.offload.optimizer == "none" and training.optimizer.kind != "sgd":  # there it is Adam alone
        stage = training.zero_stage or 2
        to_host = OffloadConfig(optimizer="cpu", parameters=training.offload.parameters)
        changes = {"zero_stage": stage, "offload": to_host, "micro_batch_size": 1}
        offloaded = ways_of.way(machine, training.model_copy(update=changes))
        if offloaded.fits:
            times = offloaded.time.step_s / nearest.time.step_s
            told.append(
                f"or training.offload.optimizer=cpu at ZeRO-{stage}{policy}: a step of {times:.1f} times as long, "
                f"{gigabytes(offloaded.host_bytes)} GB of each node's own memory"
            )
    return told


def as_json(found: Estimate) -> dict[str, Any]:
    """All of it, in bytes, seconds, FLOPs and numbers of things."""
    size, machine, budget, asked = found.size, found.machine, found.budget, found.asked
    chosen = found.recommended
    return {
        "parameters": size.parameters,
        "embedding_parameters": size.embedding_parameters,
        "macs_forward": size.macs_forward,
        "flops_forward": size.flops_forward,
        "tokens_per_sample": size.tokens,
        "batch_size": found.planned.config.training.batch_size,
        "budget": asdict(budget),
        "machine": {
            "gpu": machine.gpu.name,
            "gpu_source": asked.gpu_source,
            "gpu_memory_bytes": machine.gpu.memory_bytes,
            "usable_bytes": machine.usable_bytes,
            "nodes": machine.nodes,
            "gpus_per_node": machine.gpus_per_node,
            "ranks": machine.ranks,
            "link_gb_s": machine.gpu.link_gb_s,
            "host_gb_s": machine.gpu.host_gb_s,
            "network_gb_s": machine.network_gb_s,
        },
        "utilization": asdict(asked.utilization),
        "tokenizing": asdict(found.planned.tokenizing) if found.planned.tokenizing else None,
        "judging": asdict(found.planned.judging) if found.planned.judging else None,
        "without_tokenizer": found.without_tokenizer,
        "recommended": way_as_json(chosen, found) if chosen else None,
        "configured": way_as_json(found.configured, found) if found.configured else None,
        "why": found.why,
        "ways": [way_as_json(way, found) for way in found.ways],
        "disk": asdict(found.disk),
    }


def way_as_json(way: Way, found: Estimate) -> dict[str, Any]:
    training, budget, time = way.training, found.budget, way.time
    days = budget.days(time.step_s)
    return {
        "zero_stage": training.zero_stage,
        "policy": way.policy,
        "precision": training.precision,
        "micro_batch_size": training.micro_batch_size,
        "accumulation": way.accumulation,
        "fits": way.fits,
        "memory_bytes": way.memory.total,
        "memory": {**way.memory.parts(), "moment": way.memory.moment, "host": way.memory.host},
        "host_bytes_per_node": way.host_bytes,
        "compiled": way.compiled,
        "sent_bytes_per_step": way.sent_bytes,
        "collectives": [{**asdict(c), "sent_bytes": c.sent(found.machine.ranks)} for c in way.collectives],
        "offloaded": [asdict(transfer) for transfer in way.transfers],
        "computation_s": time.computation_s,
        "forward_s": time.forward_s,
        "tokenizing_s": time.tokenizing_s,
        "judging_s": time.judging_s,
        "between_gpus": asdict(time.between_gpus),
        "with_host": asdict(time.with_host),
        "update_on_host_s": time.update_s,
        "step_s": time.step_s,
        "samples_per_s": training.batch_size / time.step_s,
        "tokens_per_s": training.batch_size * found.size.tokens / time.step_s,
        "days": days,
        "gpu_hours": days * 24 * found.machine.ranks,
        "overrides": way.overrides,
    }
