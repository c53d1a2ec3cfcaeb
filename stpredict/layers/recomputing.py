"""Whether the forward pass that runs is one that is run again for the backward pass.

A layer with a state of its own (a codebook's moving averages, running statistics) moves it only where it is not:
``if self.training and not recomputing(): ...``
"""

# A number, as torch.compile knows nothing of a ContextVar: asking one takes the graphs of compiled layers apart.
_depth = 0


def recomputing() -> bool:
    return _depth > 0


class Recomputation:
    """What runs inside is run again. May be entered any number of times: a graph may be gone through more than once."""

    def __enter__(self) -> None:
        global _depth
        _depth += 1

    def __exit__(self, *error) -> None:
        global _depth
        _depth -= 1
