"""What a study found, in a sentence, whichever way it falls. Torch-free."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, variance

from stpredict.studies.compare import at_places_of_all
from stpredict.studies.config import Role
from stpredict.studies.look import Look
from stpredict.studies.points import TrialPoints


def headline(
    trials: Sequence[TrialPoints], axes: Mapping[str, Role], look: Look, chosen: Mapping[str, bool]
) -> tuple[str, bool | None]:
    """The sentence, and whether what was hoped for came: larger models were better (None where no size was tried, or
    there is nothing to say yet)."""
    done = [trial for trial in trials if trial.done and not trial.diverged and trial.losses]
    if axes[look.axis] != "lr":
        done = [trial for trial in done if chosen.get(trial.name, True)]
    if done and not (done := at_places_of_all(done, axes, look.axis)):
        return f"The values of {look.axis} that are done differ in other axes too: they are not compared.", None
    losses = {label: [trial.final_loss for trial in done if trial.at[look.axis] == label] for label in look.labels}
    means = {label: mean(values) for label, values in losses.items() if values}
    if not means and any(trial.state == "done" for trial in trials):
        return "What is done has no validation losses: there is nothing to compare.", None
    if not means:
        return "No trial is done yet: there is no result.", None
    metric = next(trial.metric for trial in done)
    if len(means) == 1:
        ((label, loss),) = means.items()
        return f"Only {look.names[label]} is done: {metric} {loss:.4g}; nothing to compare it with yet.", None
    noise = _noise(done, axes)
    best = min(means, key=means.get)
    if axes[look.axis] != "size":
        worst = max(means, key=means.get)
        difference = means[worst] - means[best]
        return (
            f"The least {metric}, {means[best]:.4g}, is that of {best}; the greatest, {means[worst]:.4g}, that of "
            f"{worst}{_against(difference, noise)}.",
            None,
        )
    smallest, largest = next(iter(means)), list(means)[-1]
    difference = means[smallest] - means[largest]
    falls = all(a >= b for a, b in zip(list(means.values()), list(means.values())[1:], strict=False))
    if best == largest:
        how = "The larger the model, the lower its loss" if falls else "The largest model has the lowest loss"
        return (
            f"{how}: {metric} {means[smallest]:.4g} with {look.names[smallest]}, {means[largest]:.4g} with "
            f"{look.names[largest]}{_against(difference, noise)}.",
            True,
        )
    return (
        f"The largest model does NOT have the lowest loss: {metric} {means[largest]:.4g} with {look.names[largest]}, "
        f"{means[best]:.4g} with {look.names[best]}{_against(means[largest] - means[best], noise)}.",
        False,
    )


def _noise(trials: Sequence[TrialPoints], axes: Mapping[str, Role]) -> float | None:
    """Standard deviation between trials that differ in their seed alone, their variances pooled; None where there are
    no two."""
    alike: dict[tuple[str, ...], list[float]] = {}
    for trial in trials:
        place = tuple(trial.at[axis] for axis, role in axes.items() if role != "seed")
        alike.setdefault(place, []).append(trial.final_loss)
    free = sum(len(losses) - 1 for losses in alike.values())
    squares = sum((len(losses) - 1) * variance(losses) for losses in alike.values() if len(losses) > 1)
    return math.sqrt(squares / free) if free else None


def _against(difference: float, noise: float | None) -> str:
    if noise is None:
        return " (no two runs differ in their seed alone: how much of it is chance is not known)"
    if noise == 0:
        return ""
    times = difference / noise
    if times < 2:
        return f" (a difference of {difference:.2g}, within what seeds differ by: {noise:.2g})"
    return f" (a difference of {difference:.2g}; seeds differ by {noise:.2g})"
