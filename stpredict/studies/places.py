"""Where a trial stands on the axes of its study: what its labels say in numbers, and in which order they come."""

import math
import re
from collections.abc import Iterable, Sequence

UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
NUMBERS = re.compile(r"([\d.]+(?:e-?\d+)?(?:x[\d.]+)*)([kKMB]?)")


def number_of(label: str, axis: str = "") -> float | None:
    """The number that a label carries: seed1 → 1, lr3e-3 → 0.003, block1x4x4 → 16 (tokens), s700M → 7e8; None where it
    carries none, or more than one."""
    text = label.removeprefix(axis).replace("_", ".").strip(".-")
    found = NUMBERS.fullmatch(re.sub(r"^[A-Za-z]+(?=[\d.])", "", text))
    if not found:
        return None
    try:
        return math.prod(float(part) for part in found[1].split("x")) * UNITS[found[2]]
    except ValueError:
        return None


def numbers_of(labels: Iterable[str], axis: str = "") -> dict[str, float] | None:
    """Of each label; None where one has none, or two have the same: shapes of as many tokens are no numbers."""
    found = {label: number_of(label, axis) for label in labels}
    if None in found.values() or len(set(found.values())) < len(found):
        return None
    return found


def in_order(labels: Sequence[str], axis: str = "") -> list[str]:
    """By their numbers where all have one, otherwise as they come."""
    labels = list(dict.fromkeys(labels))
    found = {label: number_of(label, axis) for label in labels}
    return labels if None in found.values() else sorted(labels, key=found.__getitem__)


def short(label: str, axis: str) -> str:
    """``label`` without the name of its axis: block1x1x8 → 1x1x8."""
    rest = label.removeprefix(axis)
    return rest if rest[:1].isdigit() else label
