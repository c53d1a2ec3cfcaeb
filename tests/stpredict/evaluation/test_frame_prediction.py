import math

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from stpredict.evaluation import frame_prediction
from stpredict.evaluation.frame_prediction import evaluate
from stpredict.evaluation.generated import Generated, Index, read_generated
from stpredict.evaluation.results import as_text, read_evaluation
from stpredict.jobs import evaluate as job
from stpredict.jobs.config import EvaluateConfig
from stpredict.run import Run

EXACT_DB = 20 * math.log10(4 * 255)
RNG = np.random.default_rng(0)


def clips(n: int = 3, t: int = 8, size: int = 12, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (n, t, size, size, channels), dtype=np.uint8)


def generated(truth, prediction=None, reconstruction=None, tokens=None, codebook_size=64, given=3) -> Generated:
    index = Index(keys=[str(n) for n in range(len(truth))], given_frames=given, codebook_size=codebook_size)
    tokens = np.zeros((len(truth), 2, 2, 2), np.int64) if tokens is None else tokens
    prediction = truth if prediction is None else prediction
    return Generated(index, truth, prediction, truth if reconstruction is None else reconstruction, tokens)


def psnr(a, b) -> np.ndarray:
    """Of every frame, floored at a quarter of a grey level."""
    mse = ((a.astype(float) - b.astype(float)) ** 2).mean(axis=(2, 3, 4))
    return 10 * np.log10(255**2 / np.maximum(mse, 1 / 16))


def test_repeating_is_perfect_where_nothing_moves_and_is_not_beaten():
    still = np.repeat(clips(t=1), 8, axis=1)
    result = evaluate(generated(still, prediction=255 - still))
    assert result.repeat_last_frame.psnr == pytest.approx(EXACT_DB)
    assert result.repeat_last_frame.ssim == pytest.approx(1)
    assert not result.beats_repeating
    assert "do NOT beat" in result.verdict()
    assert f"{-result.gain_over_repeat_db:.2f} dB" in result.verdict()


def test_a_prediction_that_equals_the_truth_beats_repeating_by_all_there_is():
    truth = clips()
    result = evaluate(generated(truth))
    expected = EXACT_DB - psnr(np.repeat(truth[:, 2:3], 5, axis=1), truth[:, 3:]).mean()
    assert result.prediction.mse == 0
    assert result.gain_over_repeat_db == pytest.approx(expected)
    assert result.verdict() == f"Predictions beat repeating the last frame by {expected:.2f} dB PSNR."


def test_repeating_against_itself_is_not_called_a_win():
    truth = clips()
    prediction = truth.copy()
    prediction[:, 3:] = truth[:, 2:3]
    result = evaluate(generated(truth, prediction))
    assert result.gain_over_repeat_db == 0
    assert not result.beats_repeating


def test_the_mean_is_over_the_psnr_of_predicted_frames_and_not_the_psnr_of_the_mean_error():
    truth, prediction = clips(), clips()
    prediction[:, 5:] = truth[:, 5:] // 2  # frames of very different error
    result = evaluate(generated(truth, prediction))
    expected = psnr(prediction, truth)[:, 3:]
    np.testing.assert_allclose(result.prediction.per_frame.psnr, expected.mean(0))
    assert result.prediction.psnr == pytest.approx(expected.mean())
    assert result.predicted_frames == len(result.frame_numbers) == 5
    assert result.frame_numbers[0] == 4


def test_the_standard_error_is_that_of_the_clips_mean_gains():
    truth, prediction = clips(n=6), clips(n=6)
    gains = (psnr(prediction, truth) - psnr(truth[:, 2:3], truth))[:, 3:].mean(1)
    result = evaluate(generated(truth, prediction))
    assert result.gain_over_repeat_stderr_db == pytest.approx(gains.std(ddof=1) / math.sqrt(6))
    assert evaluate(generated(truth[:1], prediction[:1])).gain_over_repeat_stderr_db is None


def test_the_best_constant_frame_is_each_clips_mean_colour():
    truth, reconstruction = clips(), clips()
    truth[0] //= 4  # clips of different brightness
    result = evaluate(generated(truth, reconstruction=reconstruction))
    constant = truth.mean(axis=(1, 2, 3), keepdims=True)
    assert result.tokenizer.constant_frame_psnr == pytest.approx(psnr(constant, truth).mean())
    assert result.tokenizer.psnr == pytest.approx(psnr(reconstruction, truth).mean())
    assert result.tokenizer.gain_db == pytest.approx(result.tokenizer.psnr - result.tokenizer.constant_frame_psnr)


def test_nothing_is_gained_on_clips_of_one_colour():
    flat = np.broadcast_to(np.uint8([10, 100, 200]), (2, 8, 12, 12, 3)).copy()
    result = evaluate(generated(flat))
    assert result.tokenizer.constant_frame_psnr == pytest.approx(EXACT_DB)
    assert result.tokenizer.gain_db == pytest.approx(0)


def test_perplexity_of_codes_used_alike_is_their_number():
    tokens = np.tile([3, 8, 21, 60], 6).reshape(3, 2, 2, 2)
    result = evaluate(generated(clips(), tokens=tokens)).tokenizer
    assert (result.codes_used, result.codebook_size, result.tokens) == (4, 64, 24)
    assert result.codebook_perplexity == pytest.approx(4)
    assert evaluate(generated(clips())).tokenizer.codebook_perplexity == pytest.approx(1)


def test_the_chunks_do_not_change_the_numbers_and_all_clips_are_reported(monkeypatch):
    data = generated(clips(n=5), clips(n=5), clips(n=5))
    whole, calls = evaluate(data), []
    monkeypatch.setattr(frame_prediction, "CHUNK_VALUES", 2 * data.truth[0].size)
    chunked = evaluate(data, lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    for name, scores in whole.methods.items():
        for metric, values in scores.per_frame:
            np.testing.assert_allclose(getattr(chunked.methods[name].per_frame, metric), values)
    assert chunked.gain_over_repeat_stderr_db == pytest.approx(whole.gain_over_repeat_stderr_db)
    assert chunked.tokenizer.model_dump() == pytest.approx(whole.tokenizer.model_dump())


def test_the_job_writes_metrics_a_chart_and_its_table(pipeline, caplog):
    evaluate_run = Run(pipeline["evaluate"])
    result = read_evaluation(evaluate_run.path / "metrics.json")
    assert result.clips == 8
    assert result.prior_step == 300
    assert (evaluate_run.path / "frames.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate_run.status().step == 8
    for part in (result.verdict(), "repeat last frame", f"{result.prediction.psnr:.2f}", "codes in use"):
        assert part in as_text(result)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda samples: (samples / "index.json").unlink(), "finish the generate job"),
        (lambda samples: (samples / "index.json").write_text('{"keys": ["a"'), "damaged"),
        (lambda samples: (samples / "index.json").write_text('{"keys": ["a"], "given_frames": 5}'), "codebook_size"),
        (lambda samples: (samples / "prediction.npy").unlink(), "prediction.npy: not there"),
        (lambda samples: (samples / "prediction.npy").write_bytes(b""), "prediction.npy: damaged"),
        (lambda samples: (samples / "truth.npy").write_bytes((samples / "truth.npy").read_bytes()[:999]), "damaged"),
        (lambda samples: np.save(samples / "truth.npy", np.zeros((8, 17, 9, 9, 3), np.uint8)), "shape"),
        (lambda samples: np.save(samples / "truth.npy", np.zeros((8, 17, 32, 32, 3))), "float64"),
        (lambda samples: np.save(samples / "truth_tokens.npy", np.full((8, 5, 8, 8), 512)), "below 512"),
        (lambda samples: np.save(samples / "truth_tokens.npy", np.zeros((7, 5, 8, 8), int)), "tokens of 7 clips"),
    ],
)
def test_samples_that_are_missing_or_damaged_are_named_in_one_line(pipeline, damage, said):
    run = Run(pipeline["generate"])
    damage(run.samples)
    with pytest.raises(UsageError, match=said) as error:
        job.run(EvaluateConfig(run=pipeline["evaluate"], generated=run.path), Run(pipeline["evaluate"]))
    assert "\n" not in str(error.value)
    assert str(run.samples) in str(error.value)


def test_clips_without_a_frame_to_predict_are_refused(tmp_path, write_generated):
    truth = clips(t=5)
    write_generated(Run(tmp_path), truth, truth, truth, np.zeros((3, 2, 2, 2), int))
    with pytest.raises(UsageError, match="none is predicted"):
        read_generated(Run(tmp_path))


def test_frames_too_small_for_ssim_are_refused():
    with pytest.raises(UsageError, match="7x7"):
        evaluate(generated(clips(size=6)))
