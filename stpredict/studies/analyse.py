"""The analysis of a study: from what its trials left to laws, frontier and predictions. Torch-free."""

from collections.abc import Mapping, Sequence

from stpredict.studies.analysis import Analysis, BestLearningRate, Group, Law, LeftOut, NotFitted, UsedTrial
from stpredict.studies.config import AnalysisConfig, Role
from stpredict.studies.frontier import frontier
from stpredict.studies.law import Fitted
from stpredict.studies.laws import joint_law, sizes_at_equal_tokens, tokens_of_each_size
from stpredict.studies.learning_rates import at_best, best_learning_rates, learning_rate_law
from stpredict.studies.measured import Measured, by_size, diverged, measured
from stpredict.studies.optimum import optimum_of
from stpredict.studies.points import TrialPoints, without_tokens
from stpredict.studies.predictions import predictions


def analyse(trials: Sequence[TrialPoints], axes: Mapping[str, Role], analysis: AnalysisConfig) -> Analysis:
    """Fits what can be fitted to the trials of each group, those that agree on every axis of role ``other``; says what
    was left out or not fitted, and why. The same trials give the same numbers. There are no groups of
    trials that see no tokens."""
    warnings = []
    falling = sorted({trial.schedule for trial in trials if trial.schedule not in (None, "constant")})
    if analysis.points == "curve" and falling:
        warnings.append(
            f"points: curve asks for every validation, but the learning rate falls (schedule: {', '.join(falling)}): "
            "the middle of such a run is no run of that length. Each run's last validation is used instead"
        )
        analysis = analysis.model_copy(update={"points": "final"})
    other = [axis for axis, role in axes.items() if role == "other"]
    groups: dict[tuple[str, ...], list[TrialPoints]] = {}
    for trial in () if without_tokens(trials) else trials:
        groups.setdefault(tuple(trial.at[axis] for axis in other), []).append(trial)
    return Analysis(
        metric=next((trial.metric for trial in trials if trial.metric), None),
        points=analysis.points,
        counted=analysis.parameters,
        confidence=analysis.confidence,
        draws=analysis.bootstrap,
        groups=[
            _group(dict(zip(other, labels, strict=True)), members, axes, analysis) for labels, members in groups.items()
        ],
        warnings=warnings,
    )


def _group(
    at: dict[str, str], trials: Sequence[TrialPoints], axes: Mapping[str, Role], analysis: AnalysisConfig
) -> Group:
    each = [measured(trial, axes, analysis) for trial in trials]
    runs = [one for one in each if isinstance(one, Measured)]
    rates = best_learning_rates(runs, diverged(trials, axes, analysis))
    best = [run for run in runs if at_best(run, rates)]
    laws: list[Fitted | Law | NotFitted] = []
    points, iso_flops = [], []
    if best:
        joint = joint_law(best, analysis)
        front = frontier(best, analysis)
        points, iso_flops = front.points, front.iso_flops
        laws = [
            *sizes_at_equal_tokens(best, analysis),
            *tokens_of_each_size(best, analysis),
            joint,
            *front.laws,
            *optimum_of(joint, best, analysis),
            *learning_rate_law(rates, analysis),
        ]
    return Group(
        at=at,
        used=[_used(run, run in best) for run in runs],
        left_out=[one for one in each if isinstance(one, LeftOut)],
        learning_rates=rates,
        laws=[law.law if isinstance(law, Fitted) else law for law in laws if not isinstance(law, NotFitted)],
        not_fitted=[law for law in laws if isinstance(law, NotFitted)],
        frontier=points,
        iso_flops=iso_flops,
        predictions=predictions([law for law in laws if isinstance(law, Fitted)], analysis),
        warnings=_warnings(trials, runs, rates),
    )


def _used(run: Measured, best: bool) -> UsedTrial:
    return UsedTrial(
        trial=run.name,
        size=run.size,
        parameters=run.n,
        tokens=run.tokens,
        flops=run.flops,
        learning_rate=run.lr,
        loss=run.loss,
        best_lr=best,
        points=len(run.steps),
    )


def _warnings(trials: Sequence[TrialPoints], runs: Sequence[Measured], rates: Sequence[BestLearningRate]) -> list[str]:
    warnings = []
    for best in rates:
        if best.at_edge:
            place = best.size + (f", {best.of}" if best.of else "")
            warnings.append(
                f"{place}: the best learning rate, {best.best:.3g}, is at the edge of those tried; a better one may "
                "lie beyond"
            )
        counts = {one.seeds for one in best.tried}
        if len(counts) > 1:
            warnings.append(f"{best.size}: not every learning rate has as many finished runs; their means are of fewer")
    again = max((run.epochs for run in runs if run.epochs), default=0)
    if again > 1.01:
        warnings.append(
            f"the training samples were seen up to {again:.3g} times: repeated tokens are counted as tokens, and "
            "they teach less than new ones"
        )
    if cold := [run.name for run in runs if run.ends_in_warmup]:
        warnings.append(f"still in warm-up at their end: {', '.join(cold)}")
    for size, members in by_size(runs).items():
        if len({run.n for run in members}) > 1:
            warnings.append(f"{size}: its runs have different numbers of parameters")
    return warnings
