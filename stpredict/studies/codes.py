"""The use that forecasters' quantizers make of their codes (quantizer.json), where the trials of a study measured it:
means over seeds, as SVQ's paper prints them in its table 13. Torch-free."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from stpredict.evaluation.quantizer_results import QuantizerAnalysis
from stpredict.studies.cells import CellRow, CellTable, Place
from stpredict.studies.compare import spread
from stpredict.studies.measures import Measure
from stpredict.studies.points import TrialPoints


def _of(value: Callable[[QuantizerAnalysis], float | None]) -> Measure:
    return lambda trial: value(trial.quantizer) if trial.quantizer else None


def _perplexity_at(threshold: float) -> Measure:
    return _of(lambda found: next((a.perplexity for a in found.activity if a.threshold == threshold), None))


#: Column → title and measure. Perplexity and share used are of quantizers that choose codes, means over their stages;
#: perplexities at standard deviations and kurtosis of those that weigh them.
CODES: Mapping[str, tuple[str, Measure]] = {
    "codes": ("codes", _of(lambda found: found.codebook_size)),
    "code_perplexity": (
        "perplexity",
        _of(lambda found: mean(u.perplexity for u in found.uses) if found.uses else None),
    ),
    "codes_used": ("share used", _of(lambda found: mean(u.used_share for u in found.uses) if found.uses else None)),
    "code_perplexity_2sd": ("perplexity, 2 sd", _perplexity_at(2)),
    "code_perplexity_3sd": ("perplexity, 3 sd", _perplexity_at(3)),
    "kurtosis_weights": ("kurtosis of weights", _of(lambda found: found.weights and found.weights.kurtosis)),
    "kurtosis_codebook": ("kurtosis of codebook", _of(lambda found: found.codebook and found.codebook.kurtosis)),
}


def code_table(places: Sequence[Place], axes: Sequence[str]) -> CellTable | None:
    """A row, by ``axes``, for each place whose quantizer was looked at; None where there is none."""
    found: list[tuple[Place, list[TrialPoints]]] = [(p, [t for t in p.trials if t.quantizer]) for p in places]
    found = [(place, trials) for place, trials in found if trials]
    there = [
        (title, of) for title, of in CODES.values() if any(of(t) is not None for _, trials in found for t in trials)
    ]
    rows = [
        CellRow(
            [place.at[axis] for axis in axes], str(len(trials)), [spread([of(t) for t in trials]) for _, of in there]
        )
        for place, trials in found
    ]
    return CellTable(axes, [title for title, _ in there], rows, []) if rows else None
