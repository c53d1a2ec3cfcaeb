"""What a trained forecaster's quantizer does: how sparse its weights are, which codes it uses, and what becomes of the
latents (Chen et al., arXiv:2312.03406, figures 5 and 10 to 15, table 13). Results: quantizer_results.py."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from stpredict.evaluation.quantizer_results import Activity, CodeUse, Distribution, QuantizerAnalysis
from stpredict.quantizers.code_use import perplexity, share_used
from stpredict.quantizers.plug_ins import PlugIn
from stpredict.quantizers.sparsity import THRESHOLDS, Spread, SpreadCounter, spread

CHUNK_VALUES = 2**22  # of the weights, that are there at once


@dataclass
class FeatureMaps:
    """Latents of one frame before and after the quantizer, fp32 ``(channels, h', w')``."""

    before: np.ndarray
    after: np.ndarray


@torch.no_grad()
def analyse(forecaster: nn.Module, batches: Iterable[Tensor]) -> QuantizerAnalysis:
    """``batches``: scaled input frames ``(b, c, t_in, h, w)`` on the forecaster's device; gone through twice, so an
    iterator will not do. In evaluation mode; of a roll-out the first step counts. ValueError without a quantizer,
    without batches, and where latents are all equal.
    """
    quantizer = _quantizer(forecaster)
    counters: dict[str, SpreadCounter] = {"before": SpreadCounter(), "after": SpreadCounter()}
    weighs = not isinstance(quantizer, PlugIn)
    if weighs:
        counters["weights"] = SpreadCounter()
    samples, uses = 0, 0
    forecaster.eval()
    for frames in batches:
        samples += len(frames)
        for name, chunk in _chunks(forecaster, quantizer, frames):
            counters[name].see(chunk)
        uses = uses if weighs else uses + quantizer.uses.cpu()
    if not samples:
        raise ValueError("no batches to analyse")
    for frames in batches:
        for name, chunk in _chunks(forecaster, quantizer, frames):
            counters[name].see_again(chunk)
    found = {name: counter.spread() for name, counter in counters.items()}
    config = forecaster.config.quantizer
    analysis = QuantizerAnalysis(
        quantizer=config.kind,
        place=config.place,
        samples=samples,
        locations=found["before"].rows,
        before=_distribution(found["before"]),
        after=_distribution(found["after"]),
        codebook_size=len(quantizer.codebook) if weighs else quantizer.codes,
    )
    if not weighs:
        stages = [CodeUse(perplexity=perplexity(of), used_share=share_used(of)) for of in uses]
        return analysis.model_copy(update={"uses": stages})
    codebook = spread(lambda: [quantizer.codebook])
    return analysis.model_copy(
        update={
            "weights": _distribution(found["weights"]),
            "codebook": _distribution(codebook),
            "activity": [_activity(found["weights"], threshold) for threshold in THRESHOLDS],
        }
    )


@torch.no_grad()
def feature_maps(forecaster: nn.Module, frames: Tensor) -> FeatureMaps:
    """Of the last of a sample's frames ``(c, t_in, h, w)``, scaled. ValueError without a quantizer."""
    _quantizer(forecaster)
    forecaster.eval()
    return FeatureMaps(*(latents[0, -1].float().cpu().numpy() for latents in forecaster.latents(frames[None])))


def _quantizer(forecaster: nn.Module) -> nn.Module:
    quantizer = getattr(forecaster, "quantizer", None)
    if quantizer is None:
        raise ValueError("this forecaster has no quantizer")
    return quantizer


def _chunks(forecaster: nn.Module, quantizer: nn.Module, frames: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Rows of what is looked at, and what that is."""
    before, after = forecaster.latents(frames)
    yield "before", rearrange(before, "b t c h w -> (b t h w) c")
    yield "after", rearrange(after, "b t c h w -> (b t h w) c")
    if not isinstance(quantizer, PlugIn):
        locations = max(1, CHUNK_VALUES // len(quantizer.codebook))
        for chunk in quantizer.weights(before, locations):
            yield "weights", chunk


def _distribution(found: Spread) -> Distribution:
    return Distribution(
        rows=found.rows,
        columns=found.values // found.rows,
        mean=found.mean,
        sd=found.sd,
        kurtosis=found.kurtosis,
        zeros=found.zeros,
        edges=found.edges.tolist(),
        density=found.density.tolist(),
    )


def _activity(found: Spread, threshold: float) -> Activity:
    return Activity(
        threshold=threshold,
        perplexity=found.active_perplexity(threshold),
        share=found.active_share(threshold),
        codes=found.codes_active(threshold),
    )
