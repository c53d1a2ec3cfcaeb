"""A tokenizer's reconstructions: the files, and what is measured of them."""

import html
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video
from stpredict.evaluation import reconstruction
from stpredict.evaluation.reconstructed import read_metrics, read_reconstructed
from stpredict.evaluation.report import write_report
from stpredict.evaluation.run_facts import read_facts
from stpredict.exports import load_tokenizer
from stpredict.jobs import evaluate, reconstruct
from stpredict.jobs.config import EvaluateConfig, ReconstructConfig
from stpredict.losses.config import LpipsConfig
from stpredict.losses.perceptual import Lpips
from stpredict.run import Run
from tests.stpredict.conftest import OneOf
from tests.stpredict.tokenized import CLIP, GRID, VAL


class Alone(OneOf):
    def gather(self, value):
        return [value]


@pytest.fixture
def reconstructed(tokenizer, shards, tmp_path, monkeypatch):
    @contextmanager
    def join_ranks():
        yield Alone(0, 1, torch.device("cpu"), None)

    monkeypatch.setattr(reconstruct, "join_ranks", join_ranks)

    def reconstructed(**config) -> Run:
        run = Run(tmp_path / "reconstruction")
        run.update_status(kind="reconstruct")
        data = {"shards": shards, "workers": 0, "clip": config.pop("clip", {})}
        reconstruct.run(ReconstructConfig(run=run.path, tokenizer=tokenizer, data=data, **config), run)
        return run

    return reconstructed


def measured(run: Run, folder: Path, **config) -> Run:
    out = Run(folder / "measured")
    out.update_status(kind="evaluate", state="done")
    evaluate.run(EvaluateConfig(run=out.path, generated=run.path, **config), out)
    return out


def test_arrays_are_every_held_out_clip_its_tokens_and_what_becomes_of_them(reconstructed, tokenizer):
    run = reconstructed(batch_size=2, pictures=1)
    found = read_reconstructed(run)
    assert found.truth.shape == found.reconstruction.shape == (VAL, CLIP.frames, *CLIP.size, 3)
    assert found.truth_tokens.shape == (VAL, *GRID)
    assert len(set(found.index.keys)) == VAL
    model = load_tokenizer(tokenizer)[0]
    for truth, made, tokens in zip(found.truth, found.reconstruction, found.truth_tokens, strict=True):
        ids = model.encode(to_video(torch.from_numpy(truth.copy())[None]))
        assert (ids.numpy() == tokens).mean() > 0.99
        expected = to_clip(model.decode(torch.from_numpy(tokens.astype(np.int64))[None]))[0].numpy()
        assert np.abs(expected.astype(int) - made).max() <= 1
    names = sorted(path.name for path in run.samples.iterdir())
    assert [name for name in names if name.startswith("000_")] == [
        f"000_{found.index.keys[0]}.{x}" for x in ("gif", "mp4")
    ]


def test_they_are_measured_over_all_frames(reconstructed, tmp_path, write_made_up_vgg, monkeypatch):
    run = reconstructed(clips=2)
    found = read_reconstructed(run)
    monkeypatch.setattr(reconstruction, "CHUNK_VALUES", 1)  # one clip at a time
    out = measured(run, tmp_path, lpips={"trunk": write_made_up_vgg})
    metrics = read_metrics(out.path / "metrics.json")
    error = (found.truth.astype(float) - found.reconstruction) / 255
    mse = (error**2).mean(axis=(2, 3, 4))
    assert (metrics.clips, metrics.frames, metrics.tokens) == (2, CLIP.frames, 2 * np.prod(GRID))
    assert metrics.psnr == pytest.approx((-10 * np.log10(mse)).mean())
    assert metrics.psnr_per_frame == pytest.approx((-10 * np.log10(mse)).mean(0))
    share = np.unique(found.truth_tokens, return_counts=True)[1] / found.truth_tokens.size
    assert metrics.codes_used == len(share)
    assert metrics.codebook_entropy_bits == pytest.approx(-(share * np.log2(share)).sum())
    videos = [to_video(torch.from_numpy(array.copy())) for array in (found.reconstruction, found.truth)]
    assert metrics.lpips == pytest.approx(Lpips(LpipsConfig(trunk=write_made_up_vgg))(*videos).mean().item(), rel=1e-4)
    colour = found.truth.astype(float).mean(axis=(1, 2, 3), keepdims=True)
    constant = (((found.truth - colour) / 255) ** 2).mean(axis=(2, 3, 4))
    assert metrics.constant_frame_psnr == pytest.approx((-10 * np.log10(constant)).mean())
    assert f"PSNR {metrics.psnr:.2f} dB" in metrics.in_words()
    facts = read_facts("measured", out.path)
    assert facts.reconstruction == metrics
    assert not [problem for problem in facts.problems if "damaged" in problem]


def test_a_report_shows_their_pictures(reconstructed, tmp_path):
    run = reconstructed(pictures=2)
    run.update_status(state="done")
    page = write_report("x", {"reconstruction": run.path}, tmp_path / "report.html").read_text()
    keys = read_reconstructed(run).index.keys
    assert [key in page for key in keys] == [True, True, False]
    assert page.count('src="data:image/gif;base64,') == 2
    assert "the truth, and the tokenizer's reconstruction of it" in html.unescape(page)
    assert "<strong>pictures</strong>" not in page
    (run.samples / "index.json").unlink()
    page = write_report("x", {"reconstruction": run.path}, tmp_path / "report.html").read_text()
    assert "index.json: not there; finish the reconstruct job of" in page


def test_without_weights_there_is_no_lpips(reconstructed, tmp_path):
    out = measured(reconstructed(clips=1), tmp_path)
    assert read_metrics(out.path / "metrics.json").lpips is None


def test_held_out_clips_go_through_in_parts_and_unaugmented(reconstructed, tokenizer):
    whole = read_reconstructed(reconstructed())
    truth, tokens = whole.truth.copy(), whole.truth_tokens.copy()
    tiled = read_reconstructed(reconstructed(clip={"flip": True}, tiling={"tile": (16, 32)}))
    np.testing.assert_array_equal(tiled.truth, truth)
    assert not np.array_equal(tiled.truth_tokens, tokens)
    ids = torch.from_numpy(tiled.truth_tokens.astype(np.int64))
    assert not np.array_equal(to_clip(load_tokenizer(tokenizer)[0].decode(ids)).numpy(), tiled.reconstruction)
    with pytest.raises(UsageError, match="tiling: 12 pixels: sides of tiles"):
        reconstructed(tiling={"tile": (12, 32)})


def test_a_clip_that_cannot_be_read_is_left_out(reconstructed, monkeypatch):
    def all_but_the_second(*args, **kwargs):
        for batch in clip_evaluation_batches(*args, **kwargs):
            yield batch | {"weight": batch["weight"] * (batch["index"] != 1)}

    whole = read_reconstructed(reconstructed())
    keys, truth = whole.index.keys, whole.truth.copy()
    monkeypatch.setattr(reconstruct, "clip_evaluation_batches", all_but_the_second)
    found = read_reconstructed(reconstructed())
    assert found.index.keys == [keys[0], *keys[2:]]
    np.testing.assert_array_equal(found.truth, truth[[0, *range(2, VAL)]])


def test_lpips_is_not_measured_of_what_a_prior_made(tmp_path):
    run = Run(tmp_path / "generated")
    run.update_status(kind="generate")
    with pytest.raises(UsageError, match="lpips: of the run of a reconstruct or forecast job"):
        measured(run, tmp_path, lpips={})


def test_what_does_not_fit_is_named(reconstructed, tmp_path):
    run = reconstructed(clips=1)
    np.save(run.samples / "reconstruction.npy", np.zeros((2, 5, 32, 32, 3), np.uint8))
    with pytest.raises(UsageError, match="the arrays are not of the same 1 clips; run the reconstruct job again"):
        measured(run, tmp_path)
    for side, lpips, message in ((6, None, "SSIM needs 7x7 at least"), (8, {}, "lpips: LPIPS needs frames of 16x16")):
        for name in ("truth", "reconstruction"):
            np.save(run.samples / f"{name}.npy", np.zeros((1, 5, side, side, 3), np.uint8))
        with pytest.raises(UsageError, match=message):
            measured(run, tmp_path, lpips=lpips)
    np.save(run.samples / "truth_tokens.npy", np.full((1, *GRID), 256))
    with pytest.raises(UsageError, match=r"truth_tokens\.npy holds ids from 256 on"):
        measured(run, tmp_path)
    index = run.samples / "index.json"
    index.write_text(json.dumps({"kind": "reconstructed"}))
    with pytest.raises(UsageError, match=r"index\.json: damaged \(Field required\)"):
        measured(run, tmp_path)


@pytest.fixture
def write_made_up_vgg(tmp_path) -> Path:
    from stpredict.losses.vgg import Vgg16

    torch.manual_seed(0)
    torch.save(Vgg16().state_dict(), tmp_path / "vgg16.pth")
    return tmp_path / "vgg16.pth"
