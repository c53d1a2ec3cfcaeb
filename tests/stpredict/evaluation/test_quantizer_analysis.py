"""The analysis of a small forecaster's quantizer against numpy and scipy on all of its latents and weights."""

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy import stats

from stpredict.evaluation.quantizer_analysis import analyse, feature_maps
from stpredict.evaluation.quantizer_charts import density_chart, feature_map_chart
from stpredict.evaluation.quantizer_results import QuantizerAnalysis
from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.simvp import SimVP

SMALL = {"channels": 2, "input_frames": 3, "output_frames": 6, "size": (8, 12), "hid_S": 8, "hid_T": 16, "N_S": 2}


def forecaster(**quantizer) -> SimVP:
    torch.manual_seed(0)
    return SimVP(SimVPConfig(**SMALL, N_T=2, quantizer=quantizer or None))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(5, 2, 3, 8, 12, generator=torch.Generator().manual_seed(1)).split(2))


def latents(model: SimVP) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all batches, before and after."""
    model.eval()
    with torch.no_grad():
        parts = [model.latents(frames) for frames in batches()]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["svq", "svq_raw"])
def test_weights_codebook_and_latents_are_those_of_all_samples(kind, place):
    model = forecaster(kind=kind, codebook_size=30, place=place).double()
    found = analyse(model, batches())
    before, after = latents(model)
    with torch.no_grad():
        weights = torch.cat(list(model.quantizer.weights(before))).double().numpy()
    assert (found.quantizer, found.place, found.samples, found.codebook_size) == (kind, place, 5, 30)
    assert found.locations == len(weights) == 5 * 3 * 4 * 6
    whole = {"before": before, "after": after, "codebook": model.quantizer.codebook.detach()}
    for name, values in {"weights": weights, **{key: value.double().numpy() for key, value in whole.items()}}.items():
        part = getattr(found, name)
        assert part.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12), name
        assert part.sd == pytest.approx(values.std(ddof=1), rel=1e-9), name
        assert part.kurtosis == pytest.approx(stats.kurtosis(values, axis=None), rel=1e-6), name
        assert part.zeros == (values == 0).mean(), name
        z = (values - values.mean()) / values.std(ddof=1)
        density = np.histogram(z, part.edges)[0] / z.size / np.diff(part.edges)
        np.testing.assert_allclose(part.density, density, err_msg=name)
    active = np.abs((weights - weights.mean()) / weights.std(ddof=1))
    assert [of.threshold for of in found.activity] == [2, 3]
    for of in found.activity:
        counts = (active > of.threshold).sum(0)
        assert of.codes == (counts > 0).sum()
        assert of.share == pytest.approx((active > of.threshold).mean())
        assert of.perplexity == pytest.approx(np.exp(stats.entropy(counts)) if counts.any() else 0)
    assert found.uses == []
    assert (found.weights.rows, found.weights.columns) == weights.shape


def test_weights_in_small_chunks_are_the_same(monkeypatch):
    model = forecaster(kind="svq", codebook_size=30)
    whole = analyse(model, batches())
    monkeypatch.setattr("stpredict.evaluation.quantizer_analysis.CHUNK_VALUES", 100)
    parts = analyse(model, batches())
    assert parts.weights.sd == pytest.approx(whole.weights.sd, rel=1e-6)
    assert parts.activity == whole.activity


@pytest.mark.parametrize(("kind", "stages", "codes"), [("vq", 1, 512), ("residual_vq", 8, 1024), ("lfq", 1, 8192)])
def test_codes_that_are_chosen_are_counted_over_all_samples(kind, stages, codes):
    model = forecaster(kind=kind)
    found = analyse(model, batches())
    with torch.no_grad():
        before, _ = latents(model)
        _, numbers, *_ = model.quantizer.layer(
            model.quantizer.project_in(rearrange(before, "b t c h w -> b (t h w) c"))
        )
    chosen = rearrange(numbers, "b n ... -> (b n) (...)")
    assert chosen.shape[1] == len(found.uses) == stages
    for stage, of in zip(chosen.T, found.uses, strict=True):
        counts = np.bincount(stage.numpy(), minlength=codes)
        assert of.perplexity == pytest.approx(np.exp(stats.entropy(counts)))
        assert of.used_share == (counts > 0).mean()
    assert (found.weights, found.codebook, found.activity, found.codebook_size) == (None, None, [], codes)
    assert f"of {codes:,} codes" in found.in_words()


def test_the_analysis_survives_json_and_says_it_in_a_line():
    found = analyse(forecaster(kind="svq", codebook_size=30), batches())
    assert QuantizerAnalysis.model_validate_json(found.model_dump_json()) == found
    said = found.in_words()
    assert "\n" not in said
    assert f"perplexity {found.activity[0].perplexity:.1f} of 30 codes at 2 sd" in said
    assert f"kurtosis of weights {found.weights.kurtosis:.2f}" in said


def test_feature_maps_are_the_latents_of_the_last_given_frame():
    model = forecaster(kind="svq", codebook_size=30)
    before, after = latents(model)
    maps = feature_maps(model, batches()[0][1])
    np.testing.assert_allclose(maps.before, before[1, -1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps.after, after[1, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "panels"), [("svq", 3), ("vq", 1)])
def test_charts_show_what_was_found(kind, panels, tmp_path):
    model = forecaster(kind=kind, codebook_size=30)
    found = analyse(model, batches())
    figure = density_chart(found)
    assert len(figure.axes) == panels
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert f"after: kurtosis {found.after.kurtosis:.1f}" in labels
    if kind == "svq":
        assert f"W: kurtosis {found.weights.kurtosis:.1f}" in labels
        np.testing.assert_allclose(figure.axes[0].patches[0].get_data().values, found.weights.density)
    figure.savefig(tmp_path / "density.png")
    figure = feature_map_chart(feature_maps(model, batches()[0][0]))
    assert sum(bool(axes.images) for axes in figure.axes) == 16
    figure.savefig(tmp_path / "maps.png")


def test_what_cannot_be_analysed_is_refused():
    with pytest.raises(ValueError, match="no quantizer"):
        analyse(forecaster(), batches())
    with pytest.raises(ValueError, match="no quantizer"):
        feature_maps(forecaster(), batches()[0][0])
    with pytest.raises(ValueError, match="no batches"):
        analyse(forecaster(kind="vq"), [])
    with pytest.raises(ValueError, match="0 the second"):
        analyse(forecaster(kind="svq", codebook_size=30), iter(batches()))
