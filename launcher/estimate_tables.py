"""Estimates as a person reads them: tables of at most 80 columns, and a line for everything that is assumed."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stpredict.estimates.duration import work
from stpredict.estimates.estimate import Asked, Estimate
from stpredict.estimates.judging import Judging
from stpredict.estimates.machine import MARGIN, Machine
from stpredict.estimates.offloading import UPDATED_PER_S
from stpredict.estimates.recommendation import SHORT_S, gigabytes
from stpredict.estimates.several import Row
from stpredict.estimates.ways import Way
from stpredict.training.flops import FORWARDS_PER_STEP

WIDTH = 80
SHOWN_APART = 0.02  # the multiply-adds of papers and the computed ones, where they differ by more


def show_training(name: str, found: Estimate, latents: dict[str, int] | None) -> None:
    console = Console(width=WIDTH, highlight=False)
    size, machine, training = found.size, found.machine, found.planned.config.training
    tables = f", {size.embedding_parameters:,} of them in look-up tables" if size.embedding_parameters else ""
    tokens = f" of {size.tokens:,} tokens" if size.tokens else ""
    flops = FORWARDS_PER_STEP * size.flops_forward * training.batch_size
    console.print(f"[bold]{name}[/]: {size.parameters:,} parameters{tables}")
    console.print(
        f"forward {amount(size.flops_forward / 2, 'MAC')} per sample{tokens}; a step of {training.batch_size} samples "
        f"{amount(flops, 'FLOP')}"
    )
    if abs(2 * size.macs_forward / size.flops_forward - 1) > SHOWN_APART:
        console.print(f"as papers count it, {amount(size.macs_forward, 'MAC')}: docs/estimates.md#multiply-adds")
    if tokenizing := found.planned.tokenizing:
        console.print(
            f"clips are tokenized in every step: {amount(tokenizing.flops / 2, 'MAC')} per clip, forward alone, in "
            "fp32 (TF32 where the GPU has it)"
        )
    if judging := found.planned.judging:
        console.print(_judging(judging, training.batch_size))
    console.print(_machine(machine, found.asked))
    console.print(_ways(found))
    if latents:
        console.print(
            f"cache of latents: {gigabytes(latents['bytes'])} GB for {latents['clips']:,} clips, "
            f"{latents['per_clip_bytes']:,} bytes of token ids each"
        )
    if found.recommended:
        _recommended(console, found, found.recommended)
    else:
        console.print("\n[bold red]It does not fit.[/]")
        for reason in found.why:
            console.print(f"- {reason}")
    _configured(console, found)
    shortest = min(way.time.step_s for way in found.ways)
    _assumptions(console, found.machine, found.asked, found.ways, shortest)
    if found.without_tokenizer:
        _left_out(console, f"none is there (tokenizer: {found.planned.config.tokenizer})")


def _judging(judging: Judging, batch_size: int) -> str:
    """What is computed beside the model."""
    model = f"{amount(batch_size * judging.model_flops, 'FLOP')} in the model's step"
    if not judging.parameters:
        return f"the networks of its losses take {model} besides, in fp32 (TF32 where the GPU has it)"
    r1 = judging.r1_flops and f", {amount(batch_size * judging.r1_flops, 'FLOP')} more with R1"
    return (
        f"a discriminator of {judging.parameters:,} parameters and the networks of losses take {model} besides, "
        f"{amount(batch_size * judging.discriminator_flops, 'FLOP')} in the discriminator's{r1 or ''}; in fp32 (TF32 "
        "where the GPU has it)"
    )


def _ways(found: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "ZeRO", "recomputed", "micro-batch", "GB/GPU", "GB/host", "GB sent", "step"):
        table.add_column(heading, justify="left" if heading in ("recomputed", "") else "right", no_wrap=True)
    for way in found.ways:
        chosen = way is found.recommended
        mark = "[green]→ ✓[/]" if chosen else "[green]  ✓[/]" if way.fits else "[red]  ✗[/]"
        table.add_row(
            mark,
            str(way.training.zero_stage),
            {"none": "nothing"}.get(way.policy, way.policy),
            str(way.training.micro_batch_size),
            gigabytes(way.memory.total),
            _or_none(way.host_bytes),
            _or_none(way.sent_bytes),
            seconds(way.time.step_s) if way.fits else "-",
            style="bold" if chosen else "",
        )
    return table


def _or_none(number: float) -> str:
    return gigabytes(number) if number else "0"


def _recommended(console: Console, found: Estimate, way: Way) -> None:
    budget, time = found.budget, way.time
    console.print(f"[bold]Recommended[/], on {found.machine}:")
    for reason in found.why:
        console.print(f"- {reason}")
    console.print(f"\n  {' '.join(way.overrides[:2])} \\\n  {' '.join(way.overrides[2:])}\n")
    parts = sorted(way.memory.parts().items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {gigabytes(value)}" for name, value in parts if value > 0.01 * way.memory.total)
    console.print(f"memory, GB per GPU at its most, in {way.memory.moment}: {shown}")
    if way.host_bytes:
        console.print(f"{gigabytes(way.host_bytes)} GB of each node's own memory, {gigabytes(way.memory.host)} a rank")
    for collective in way.collectives:
        console.print(
            f"sent by each GPU in a step: {gigabytes(collective.sent(found.machine.ranks))} GB, {collective.what} "
            f"({collective.kind}; {_beside(collective.beside)})"
        )
    for transfer in way.transfers:
        console.print(
            f"between each GPU and its host in a step: {gigabytes(transfer.moved)} GB, {transfer.what} "
            f"({_beside(transfer.beside)})"
        )
    tokenizing = f"{seconds(time.tokenizing_s)} of tokenizing, " if time.tokenizing_s else ""
    judging = f"{seconds(time.judging_s)} of judging, " if time.judging_s else ""
    offloading = time.with_host.total_s + time.update_s
    console.print(
        f"a step: {tokenizing}{seconds(time.computation_s)} of computation, {judging}"
        f"{seconds(time.between_gpus.total_s)} of communication"
        + (f", {seconds(offloading)} of offloading ({seconds(time.update_s)} the CPUs' update)" if offloading else "")
    )
    if time.between_gpus.total_s > time.computation_s:
        console.print("[bold yellow]Communication takes longer than computation:[/] fewer nodes, or larger batches")
    tokens = found.size.tokens * found.planned.config.training.batch_size / time.step_s
    samples = found.planned.config.training.batch_size / time.step_s
    rate = f"{round_to(tokens)} tokens/s, " if tokens else ""
    console.print(f"{rate}{round_to(samples)} samples/s")
    of = f" ({amount(budget.tokens, 'token')}s)" if budget.tokens else ""
    days = budget.days(time.step_s)
    console.print(
        f"[bold]{budget.steps:,} steps{of}: {duration(days)}, {round_to(days * 24 * found.machine.ranks)} GPU-hours[/]"
    )
    disk = found.disk
    console.print(
        f"disk: {gigabytes(disk.checkpoint)} GB a checkpoint, {gigabytes(disk.export)} GB the export, "
        f"{gigabytes(disk.peak)} GB at most ({disk.checkpoints} checkpoints)"
    )


def _beside(beside: str | None) -> str:
    return {"backward": "beside the backward pass", "computation": "beside the computation"}.get(
        beside, "the computation waits"
    )


def _configured(console: Console, found: Estimate) -> None:
    way = found.configured
    if way is None or (found.recommended and way.overrides == found.recommended.overrides):
        return
    verdict = "fits" if way.fits else f"does not fit {gigabytes(found.machine.usable_bytes)} GB"
    console.print(
        f"\nThe config's own settings on these GPUs, ZeRO-{way.training.zero_stage}, "
        f"micro-batch {way.training.micro_batch_size}, "
        f"policy {way.policy}: {gigabytes(way.memory.total)} GB per GPU, {verdict}"
    )


def _assumptions(console: Console, machine: Machine, asked: Asked, ways: Sequence[Way], step_s: float) -> None:
    console.print("\nMeasured or assumed:" if asked.utilization.source == "measured" else "\nAssumed:")
    gpu, use = machine.gpu, asked.utilization
    again = "; recomputation comes on top" if any(work(w.training.activation_checkpointing) > 1 for w in ways) else ""
    if use.source == "measured":
        console.print(
            f"- MFU {use.mfu:.2f} while it computes{again}: {use.mfu_of_run:.2f} is the median of {use.run}, less what "
            "that sent, recomputed and offloaded, estimated as here"
        )
    else:
        console.print(f"- MFU {use.mfu:g} of the model's own FLOPs while it computes{again} (--mfu, --mfu-from RUN)")
    if not all(way.compiled for way in ways):
        where = "at ZeRO-3 and with policy selective" if any(way.compiled for way in ways) else "in all of these ways"
        console.print(
            f"- the same MFU without torch.compile, which is off {where}: what it gains has not been measured"
        )
    console.print(f"- {100 * MARGIN:.0f} % of a GPU's memory for CUDA, NCCL and fragments; the rest may be filled")
    if machine.ranks > 1:
        console.print(f"- {gpu.link_gb_s:g} GB/s from each GPU to the others of its node ({gpu.link}, datasheet)")
    if machine.nodes > 1:
        console.print(f"- {machine.network_gb_s:g} GB/s for each GPU between nodes (--network)")
    if any(way.transfers for way in ways):
        console.print(f"- {gpu.host_gb_s:g} GB/s between each GPU and its host, one direction at a time (datasheet)")
    if any(way.time.update_s for way in ways):
        console.print(
            f"- a node's CPUs update {amount(UPDATED_PER_S, 'parameters')}/s: of 28 bytes each, in a memory that moves "
            "some 100 GB/s"
        )
    if step_s < SHORT_S:
        console.print(
            "[bold yellow]- steps as short as these wait for kernels to be launched: expect far longer ones[/]"
        )
    console.print("- nothing waits for data; validation, saving and starts are left out")
    console.print("docs/estimates.md: what is exact, what is verified, what is assumed")


def show_several(name: str, rows: Sequence[Row], asked: Asked, facts: dict[str, Any]) -> None:
    console = Console(width=WIDTH, highlight=False)
    with_memory = rows[0].way.memory is not None
    machine = rows[0].machine
    console.print(f"[bold]{name}[/], each training as its config says, on {machine.gpu.name} ({asked.gpu_source})")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), width=WIDTH)
    for heading in ("training", "parameters", "steps", "GPUs", *["GB per GPU"] * with_memory, "time", "GPU-hours"):
        table.add_column(heading, justify="left" if heading == "training" else "right", overflow="fold")
    for row in rows:
        mark = "" if row.way.fits else "[red]✗[/] "
        table.add_row(
            row.name,
            amount(row.size.parameters, ""),
            f"{row.budget.steps:,}",
            str(row.machine.ranks),
            *([f"{mark}{gigabytes(row.way.memory.total)}"] if row.way.memory else []),
            duration(row.seconds / 86400),
            round_to(row.gpu_hours),
        )
    console.print(table)
    if latents := facts.get("latents"):
        console.print(f"cache of latents: {gigabytes(latents['bytes'])} GB for {latents['clips']:,} clips")
    others = f" (not counted: {', '.join(facts['not_counted'])})" if facts["not_counted"] else ""
    console.print(
        f"[bold]All trainings: {round_to(facts['gpu_hours'])} GPU-hours, "
        f"{gigabytes(facts['disk_bytes'])} GB of disk at most[/]{others}"
    )
    if "days" in facts:
        console.print(f"{facts['trials']} trials, {facts['at_once']} at once: {duration(facts['days'])}{others}")
    if not all(row.way.fits for row in rows):
        console.print("✗: does not fit; stpredict estimate with that job's own config recommends what does")
    largest = max((row.machine for row in rows), key=lambda machine: machine.nodes)
    _assumptions(console, largest, asked, [row.way for row in rows], min(row.way.time.step_s for row in rows))
    if without := [row.name for row in rows if row.without_tokenizer]:
        _left_out(console, f"of {', '.join(without)}, which is not there yet")


def _left_out(console: Console, why: str) -> None:
    console.print(
        "[bold yellow]The tokenizer that runs in every step (data.kind: clips) is in neither time nor memory[/]: "
        f"{why}; give tokenizer=PATH, of a run or an export"
    )


def _machine(machine: Machine, asked: Asked) -> str:
    return (
        f"{machine} {machine.gpu.name} ({asked.gpu_source}):\n{machine.gpu.memory_gib:g} GiB = "
        f"{gigabytes(machine.gpu.memory_bytes)} GB each, of which {gigabytes(machine.usable_bytes)} may be filled"
    )


def amount(value: float, unit: str) -> str:
    """12.3 TFLOP: three digits."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            digits = value / 10**power
            number = f"{digits:.0f}" if digits >= 100 else f"{digits:.3g}"
            return f"{number} {prefix}{unit}" if unit else f"{number} {prefix}"
    return f"{value:.0f} {unit}".strip()


def round_to(value: float, digits: int = 2) -> str:
    """Two digits: 1,200; 0.034."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def seconds(value: float) -> str:
    return f"{round_to(value)} s" if value >= 1 else f"{round_to(1000 * value)} ms"


def duration(days: float) -> str:
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 1.5 * size:
            return f"{round_to(days / size)} {unit}"
    return f"{round_to(days * 86400)} seconds" if days * 86400 >= 1 else "under a second"
