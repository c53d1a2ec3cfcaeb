"""Several shard sets in one training run: which of them a step draws from. Torch-free."""

from collections.abc import Mapping

from data_pipeline.seeding import share


def chosen(weights: Mapping[str, float], seed: int, step: int) -> str:
    """The set that training step ``step`` draws all of its samples from: by (seed, step) alone, so that every rank
    chooses alike and a resumed run chooses as the interrupted one would have."""
    point = share("mixture", seed, step) * sum(weights.values())
    for name, weight in weights.items():
        point -= weight
        if point < 0:
            return name
    return name  # rounding has left nothing for the last one
