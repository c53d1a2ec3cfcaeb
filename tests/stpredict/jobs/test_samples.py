"""Videos from nothing, of given classes, by priors that know nothing."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UsageError, UserError
from stpredict.config import as_yaml
from stpredict.evaluation.generated import read_generated, read_index
from stpredict.evaluation.report import write_report
from stpredict.exports import PriorExport, load_tokenizer
from stpredict.jobs import generate
from stpredict.jobs.config import GenerateConfig
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.prefixes import text_tokenizer_hash
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import TilingConfig
from stpredict.training.ranks import Ranks
from tests.stpredict.tokenized import GRID, VAL

CLASSES = ["class0", "class1", "walk"]
CODES = 256


class OneOf(Ranks):
    """A rank that meets no others."""

    def barrier(self) -> None:
        pass


@pytest.fixture
def export(tokenizer, tmp_path):
    """Writes a prior of this conditioning; returns where."""

    def write(codes=CODES, grid=GRID, classes=CLASSES, **conditioning):
        torch.manual_seed(0)
        size = {"layers": 1, "width": 32, "heads": 1, "mlp_width": 48, "block": (1, 2, 4), "dropout": 0}
        model = NextBlockConfig(**size, conditioning=conditioning)
        classes = classes if model.labelled else []
        prior = NextBlockPrior(model, CODES, GRID, len(classes))
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        about = {"tokenizer_fingerprint": load_tokenizer(tokenizer)[2], "model": model, "classes": classes}
        if model.conditioning.kind == "text":
            about["text_tokenizer"] = text_tokenizer_hash(model.conditioning.tokenizer)
        folder = tmp_path / f"prior_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file(prior.state_dict(), folder / "model.safetensors")
        (folder / "config.yaml").write_text(as_yaml(PriorExport(codebook_size=codes, grid=grid, **about)))
        return folder

    return write


@pytest.fixture
def made(tokenizer, tmp_path, monkeypatch):
    """Runs the job on one rank, or on several one after another; returns the run."""

    def make(prior, ranks=1, **changes) -> Run:
        run = Run(tmp_path / f"samples_{len(list(tmp_path.iterdir()))}")
        run.update_status(kind="generate")
        settings = {"given_frames": 0, "clips": 7, "batch_size": 3, "pictures": 0, **changes}
        config = GenerateConfig(run=run.path, prior=prior, tokenizer=tokenizer, **settings)
        for rank in reversed(range(ranks)):  # the main one last: it puts the parts together

            @contextmanager
            def join_ranks(rank=rank):
                yield OneOf(rank, ranks, torch.device("cpu"), None)

            monkeypatch.setattr(generate, "join_ranks", join_ranks)
            generate.run(config, run)
        return run

    return make


def test_every_class_gets_its_share_and_the_index_says_which(export, made):
    run = made(export(kind="class"))
    index = json.loads((run.samples / "index.json").read_text())
    assert index["keys"] == ["class0-0", "class0-1", "class0-2", "class1-0", "class1-1", "walk-0", "walk-1"]
    assert index["classes"] == ["class0"] * 3 + ["class1"] * 2 + ["walk"] * 2
    clips = np.load(run.samples / "prediction.npy")
    assert clips.shape == (7, 5, 32, 32, 3)
    assert len({clip.tobytes() for clip in clips}) == 7
    for name in ("classes.gif", "classes.mp4", "classes.png"):
        assert (run.samples / name).stat().st_size > 1000
    speed = read_index(run).speed
    assert (speed.clips, speed.batches, speed.forward_steps, speed.predicted_frames) == (7, 3, 6, 35)
    page = write_report("x", {"samples": run.path}, run.path / "report.html").read_text()
    assert "Clips made from nothing, side by side" in page
    assert "<figcaption>classes</figcaption>" in page
    with pytest.raises(UsageError, match="made from nothing; there is no truth"):
        read_generated(run)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_p": 0.9, "guidance": 2}])
def test_a_video_depends_on_neither_batch_nor_ranks(export, made, sampling):
    prior = export(kind="class", start="hybrid")
    first = np.load(made(prior, sampling=sampling).samples / "tokens.npy")
    other = np.load(made(prior, ranks=3, batch_size=2, sampling=sampling).samples / "tokens.npy")
    np.testing.assert_array_equal(first, other)


def test_chosen_classes_alone_are_made_as_among_all(export, made):
    prior = export(kind="class")
    of_all = made(prior)
    chosen = made(prior, classes=("walk",), clips=2)
    np.testing.assert_array_equal(np.load(chosen.samples / "tokens.npy"), np.load(of_all.samples / "tokens.npy")[-2:])


def test_guidance_0_forgets_the_class(export, made):
    run = made(export(kind="class"), sampling={"guidance": 0, "temperature": 0})
    assert len(np.unique(np.load(run.samples / "tokens.npy"), axis=0)) == 1


def test_a_prior_of_texts_needs_the_file_that_it_was_trained_with(export, made, tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "class1": 1, "walk": 2}, unk_token="[UNK]"))
    words.save(str(tmp_path / "text.json"))
    prior = export(kind="text", tokenizer=tmp_path / "text.json", vocabulary=3, tokens=2)
    run = made(prior, clips=3, sampling={"guidance": 2, "temperature": 0})
    assert len(np.unique(np.load(run.samples / "tokens.npy"), axis=0)) == 3
    words.add_tokens(["more"])
    words.save(str(tmp_path / "text.json"))
    with pytest.raises(UsageError, match=r"text.json: is not the file that .* was trained with; put that one there"):
        made(prior)


def test_a_prior_that_is_told_nothing_makes_videos_too(export, made):
    assert read_index(made(export(kind="none"), clips=2)).keys == ["sample-0", "sample-1"]


def test_told_clips_are_continued_as_their_class(export, made, shards):
    data = {"shards": shards, "workers": 0}
    prior = export(kind="class")
    run = made(prior, data=data, given_frames=1, sampling={"guidance": 3, "temperature": 0})
    generated = read_generated(run)
    assert len(generated.prediction) == VAL
    without = made(prior, data=data, given_frames=1, sampling={"guidance": 0, "temperature": 0})
    assert not np.array_equal(read_generated(without).prediction, generated.prediction)


def test_the_tokenizer_takes_videos_in_parts(export, made, shards, monkeypatch):
    """Tiles change frames a little where norms are those of a tile, and with them the tokens that are given."""
    tiling = {"tile": (16, 32), "overlap": 8, "latent_frames": 1}
    of_nothing, prior = export(kind="none"), export(kind="class")
    samples, tiled = (made(of_nothing, clips=2, **some).samples for some in ({}, {"tiling": tiling}))
    np.testing.assert_array_equal(np.load(tiled / "tokens.npy"), np.load(samples / "tokens.npy"))
    assert not np.array_equal(np.load(tiled / "prediction.npy"), np.load(samples / "prediction.npy"))
    data = {"shards": shards, "workers": 0}
    runs, decode, tilings = [made(prior, data=data, given_frames=1)], CausalCnnTokenizer.decode, []
    monkeypatch.setattr(CausalCnnTokenizer, "decode", lambda *args: tilings.append(args[2:]) or decode(*args))
    runs.append(made(prior, data=data, given_frames=1, tiling=tiling))
    assert set(tilings) == {(TilingConfig(**tiling),)}
    whole, parts = map(read_generated, runs)
    np.testing.assert_array_equal(parts.truth, whole.truth)
    for name in ("prediction", "reconstruction", "truth_tokens"):
        assert not np.array_equal(getattr(parts, name), getattr(whole, name))
    with pytest.raises(UsageError, match="tiling: 12 pixels: sides of tiles and their overlap have to be multiples"):
        made(prior, data=data, given_frames=1, tiling={"tile": (12, 16)})


def test_bad_wishes_are_named(export, made, shards):
    told, untold, always = export(kind="class"), export(kind="none"), export(kind="class", dropout=0)
    frames = export(kind="frames")
    for prior, changes, message in (
        (told, {"classes": ("wolk",)}, r"classes: 'wolk' is none of the 3 that .* knows; did you mean 'walk'\?"),
        (untold, {"classes": ("walk",)}, "classes: .* is told no class; leave them out"),
        (untold, {"sampling": {"guidance": 2}}, "sampling.guidance 2: .* is told no class; leave guidance at 1"),
        (always, {"sampling": {"guidance": 2}}, "was told the class of every sample: train it with model.conditioning"),
        (frames, {}, "given_frames 0: this prior continues frames"),
    ):
        with pytest.raises(UsageError, match=message):
            made(prior, **changes)
    for changes, message in (
        ({"given_frames": 1}, "the clips to continue are missing"),
        ({"data": {"shards": shards}}, "given_frames 0 makes videos from nothing; leave data out"),
        ({"data": {"shards": shards}, "given_frames": 1, "classes": ("walk",)}, "a clip that is continued has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            made(told, **changes)
    data = {"shards": shards, "workers": 0}
    with pytest.raises(UsageError, match=r"given_frames 5: .* leave some of the clip's 5 frames to predict"):
        made(told, data=data, given_frames=5)
    for changes in ({"codes": 255}, {"grid": (5, 4, 4), "kind": "none", "codes": CODES + 1}):
        with pytest.raises(UserError, match=r"the weights do not fit config.yaml: .* is missing or of another shape"):
            made(export(**{"kind": "class", **changes}))
    with pytest.raises(UsageError, match=r"data.clip: makes a token grid of"):
        made(export(kind="class", grid=(5, 4, 4)), data=data, given_frames=1)


def test_a_class_that_the_prior_does_not_know_is_named(export, made, shards):
    data = {"shards": shards, "workers": 0}
    with pytest.raises(UsageError, match=r"has the class 'class1', which .* does not know"):
        made(export(kind="class", classes=["class0"]), data=data, given_frames=1)
