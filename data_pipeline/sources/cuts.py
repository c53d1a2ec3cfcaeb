"""A long recording cut along time into samples: which split each is of, and which of its steps are read. Torch-free."""

from collections.abc import Sequence

from data_pipeline.config import Split
from data_pipeline.errors import UsageError


def splits_in_time(starts: Sequence[int], span: int, validation: float, test: float = 0) -> list[Split | None]:
    """The split of each sample, of ``span`` steps from its ascending start: the share ``test`` of the samples that are
    last tests, the share ``validation`` of the others that are last validates, and what is left trains.

    None for samples that reach into the next split. UsageError where that leaves none to train on.
    """
    tested = _held_out(len(starts), test)
    validated = _held_out(len(starts) - tested, validation)
    counts = {"train": len(starts) - tested - validated, "val": validated, "test": tested}
    splits, end = [], 0
    for split, count in counts.items():
        first, end = end, end + count
        limit = starts[end] if end < len(starts) else None
        splits += [split if limit is None or start + span <= limit else None for start in starts[first:end]]
    if "train" not in splits:
        raise UsageError(
            f"{len(starts)} samples of {span} steps: those that are left for training reach into the ones held out; "
            "give source.train and the other splits as ranges, or shorter samples"
        )
    return splits


def _held_out(samples: int, share: float) -> int:
    """So many of ``samples``: at least one, and not all."""
    return min(max(1, round(samples * share)), samples - 1) if share else 0


def as_index(steps: Sequence[int]) -> slice | list[int]:
    """Ascending steps as a slice where they are evenly apart: nothing else of a file is read then."""
    apart = steps[1] - steps[0] if len(steps) > 1 else 1
    even = range(steps[0], steps[-1] + 1, apart)
    return slice(even.start, even.stop, apart) if list(even) == list(steps) else list(steps)
