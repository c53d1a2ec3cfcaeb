"""Which ZeRO stage, micro-batch and recomputation a training wants, and why.

Taken is the way that loses least time to communication and recomputation, were nothing hidden; of those within
``ALIKE`` of the best, which is no more than an estimate can tell (of all, where steps are too short), the one without
recomputation, with the largest micro-batches (whose kernels are faster, which is not in the time), of the lowest stage.
"""

from collections.abc import Iterable

from stpredict.estimates.machine import Machine
from stpredict.estimates.ways import POLICIES, Way

ALIKE = 1.05
SHORT_S = 0.02  # a step below it waits for kernels to be launched: its time says nothing about which way is better


def best(ways: Iterable[Way]) -> Way | None:
    """None where none fits."""
    fitting = [way for way in ways if way.fits]
    if not fitting:
        return None
    least = min(way.time.without_overlap_s for way in fitting)
    alike = [way for way in fitting if least < SHORT_S or way.time.without_overlap_s <= ALIKE * least]
    return min(alike, key=lambda way: (POLICIES.index(way.policy), way.accumulation, way.training.zero_stage))


def reasons(chosen: Way, ways: list[Way], machine: Machine) -> list[str]:
    """In words, why ``chosen`` of ``ways``."""
    stage, micro_batch = chosen.training.zero_stage, chosen.training.micro_batch_size
    found = [_why_stage(chosen, [way for way in ways if way.policy == chosen.policy], machine)]
    fastest = min((way for way in ways if way.fits), key=lambda way: way.time.step_s)
    if chosen.time.without_overlap_s < SHORT_S:
        found.append("steps as short as these say nothing about which way is faster: the lowest stage is taken")
    elif fastest.time.step_s < 0.995 * chosen.time.step_s:
        found.append(_why_not(fastest, chosen))
    if chosen.policy == "none":
        found.append("no recomputation: activations fit without")
    else:
        without = next(way for way in ways if way.policy == "none" and way.training.zero_stage == stage)
        size = without.training.micro_batch_size
        why = (
            f"without, {size} is the largest micro-batch that fits, and {without.accumulation} of them communicate more"
            if without.fits
            else f"without, a micro-batch of 1 takes {gigabytes(without.memory.total)} GB"
        )
        found.append(f"activation_checkpointing.policy {chosen.policy}: {why}")
    if chosen.accumulation == 1:
        found.append(f"micro-batch {micro_batch}: all of a rank's share of the batch, {_used(chosen, machine)}")
    else:
        share = chosen.training.batch_size // machine.ranks
        found.append(
            f"micro-batch {micro_batch}: the largest divisor of a rank's {share} samples that fits, "
            f"{_used(chosen, machine)}; {chosen.accumulation} of them make a step"
        )
    if not chosen.compiled and any(way.compiled for way in ways):
        where = "with policy selective" if chosen.policy == "selective" else f"at ZeRO-{stage}"
        found.append(
            f"torch.compile is off {where}, and on in others of these ways: what it gains has not been measured, and "
            "all are given the same MFU"
        )
    return found


def _why_stage(chosen: Way, same_policy: list[Way], machine: Machine) -> str:
    stage = chosen.training.zero_stage
    lower = [way for way in same_policy if way.training.zero_stage < stage]
    if stage == 0:
        autocast = (
            "" if chosen.training.precision == "fp32" else ", its weights in fp32, of which autocast makes copies"
        )
        return f"ZeRO-0: all of it fits on every GPU{autocast}, so nothing has to be divided"
    if not lower:
        return f"ZeRO-{stage}: the lowest stage that goes with the rest of the config, and it fits"
    nearest = lower[-1]
    below = f"ZeRO-{nearest.training.zero_stage}"
    if not nearest.fits:
        usable = gigabytes(machine.usable_bytes)
        return (
            f"ZeRO-{stage}: the lowest that fits; {below} takes {gigabytes(nearest.memory.total)} of {usable} GB with "
            "a micro-batch of 1"
        )
    if nearest.accumulation > chosen.accumulation:
        return (
            f"ZeRO-{stage}: the lowest that fits with a micro-batch of {chosen.training.micro_batch_size}; {below} has "
            f"room for {nearest.training.micro_batch_size}"
        )
    more = nearest.time.without_overlap_s / chosen.time.without_overlap_s - 1
    return f"ZeRO-{stage}: {below} fits too, but its communication makes a step {100 * more:.0f} % longer"


def _why_not(fastest: Way, chosen: Way) -> str:
    """Though it is said to be the fastest."""
    policy = "" if fastest.policy == chosen.policy else f", policy {fastest.policy}"
    size, stage = fastest.training.micro_batch_size, fastest.training.zero_stage
    best_case = fastest.time.step_s / chosen.time.step_s
    unhidden = fastest.time.without_overlap_s / chosen.time.without_overlap_s
    said = f"ZeRO-{stage} with a micro-batch of {size}{policy} is predicted {_faster(best_case)}"
    if abs(unhidden - best_case) > 0.001:
        said += f" where all that is sent beside the computation is hidden, {_faster(unhidden)} where nothing is"
    if unhidden > ALIKE:
        return said
    if POLICIES.index(fastest.policy) > POLICIES.index(chosen.policy):
        why = "it computes again what fits without"
    elif fastest.accumulation > chosen.accumulation:
        why = f"its {fastest.accumulation} micro-batches have smaller, slower kernels, which are not in the time"
    else:
        why = "the lowest stage is taken of those within 5 %"
    compiled = ", and it goes without torch.compile" if chosen.compiled and not fastest.compiled else ""
    return f"{said}: {why}{compiled}"


def _faster(ratio: float) -> str:
    """Of times."""
    return f"{100 * abs(1 - ratio):.1f} % {'faster' if ratio <= 1 else 'slower'}"


def _used(way: Way, machine: Machine) -> str:
    return f"filling {gigabytes(way.memory.total)} of {gigabytes(machine.usable_bytes)} GB"


def gigabytes(number: float) -> str:
    """In 10^9 bytes, as precisely as an estimate is."""
    value = number / 1e9
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
