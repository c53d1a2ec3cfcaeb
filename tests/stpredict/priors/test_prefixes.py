"""What a prior is told: classes from the shards' labels, as numbers or as a real tokenizer's tokens."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest
import tokenizers
import torch

from data_pipeline.errors import UsageError
from data_pipeline.order import Share
from stpredict.jobs.config import PriorJobConfig
from stpredict.jobs.train import build_task
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.prefixes import in_words, prefixes
from stpredict.priors.task import PriorTask
from tests.stpredict.tokenized import TRAIN

NAMES = ["ApplyEyeMakeup", "wave_two hands", "JumpRope"]
SHARE = Share(0, 1, 2)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """A byte-pair tokenizer that has seen the names."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(["apply eye makeup wave two hands jump rope class0 class1"] * 2, trainer)
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    made.save(str(path))
    return path


def model(**conditioning) -> NextBlockConfig:
    size = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 32, "block": [1, 1, 4], "dropout": 0.0}
    return NextBlockConfig(**size, conditioning=conditioning)


def task(tokenizer_run, data, given_frames=0, **conditioning) -> PriorTask:
    config = PriorJobConfig.model_validate(
        {
            "run": "run",
            "data": {"workers": 0, **data},
            "tokenizer": tokenizer_run,
            "given_frames": given_frames,
            "model": model(**conditioning).model_dump(),
            "training": {"steps": 1, "batch_size": 2},
        }
    )
    return build_task(config)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("wave_two hands", "wave two hands"),
        ("wave1", "wave1"),
        ("TaiChi", "tai chi"),
    ],
)
def test_names_of_classes_in_words(name, words):
    assert in_words(name) == words


def test_texts_are_the_tokens_of_the_file_cut_to_length_and_padded(text_file):
    found = prefixes(model(kind="text", tokenizer=text_file, vocabulary=60, tokens=2), NAMES)
    theirs = tokenizers.Tokenizer.from_file(str(text_file))
    for row, length, name in zip(found.ids, found.lengths, NAMES, strict=False):
        ids = theirs.encode(in_words(name)).ids
        assert length == min(2, len(ids))
        assert row[:length].tolist() == ids[:2]
    assert found.ids[-1].tolist() == [60, 0]  # the null prefix has an id of its own
    assert found.lengths[-1] == 1
    ids, lengths = found.of(torch.tensor([1, -1]))
    assert torch.equal(ids, found.ids[[1, 3]])
    assert torch.equal(lengths, found.lengths[[1, 3]])


def test_padding_that_the_file_asks_for_is_left_out(text_file, tmp_path):
    padding = tokenizers.Tokenizer.from_file(str(text_file))
    padding.enable_padding(length=6, pad_id=0, pad_token="[UNK]")
    padding.save(str(tmp_path / "padding.json"))
    text = {"kind": "text", "vocabulary": 60, "tokens": 8}
    found, expected = (
        prefixes(model(**text, tokenizer=path), ["walk"]) for path in (tmp_path / "padding.json", text_file)
    )
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.ids, expected.ids)


def test_bad_tokenizers_of_texts_are_named(text_file, tmp_path):
    with pytest.raises(UsageError, match=r"there.json: cannot be read"):
        prefixes(model(kind="text", tokenizer=tmp_path / "there.json"), NAMES)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=r"other.json: is no tokenizer.json of the tokenizers library"):
        prefixes(model(kind="text", tokenizer=tmp_path / "other.json"), NAMES)
    with pytest.raises(UsageError, match=r"has ids up to \d+, model.conditioning.vocabulary is 20; set it to"):
        prefixes(model(kind="text", tokenizer=text_file, vocabulary=20), NAMES)


@pytest.mark.parametrize("kind", ["latents", "clips"])
def test_labels_travel_from_the_shards_into_the_batches(kind, encoded, tokenizer, shards):
    data = {"latents": encoded("latents")} if kind == "latents" else {"kind": "clips", "shards": shards}
    told = task(tokenizer, {**data, "virtual_streams": 1}, kind="class", dropout=0)
    assert told.export_config().classes == ["class0", "class1"]
    with closing(told.training_batches(SHARE, {})) as batches:
        drawn = batches.draw(0, TRAIN // 2)
    labels = {key: int(label) for batch in drawn for key, label in zip(batch["key"], batch["label"], strict=True)}
    assert len(labels) == TRAIN
    assert all(f"class{label}" in key for key, label in labels.items())
    for batch in told.validation_batches(SHARE):
        assert all(f"class{label}" in key for key, label in zip(batch["key"], batch["label"], strict=True))


def test_labels_are_dropped_by_step_and_key_whatever_the_batches(encoded, tokenizer):
    data = {"latents": encoded("latents"), "virtual_streams": 1}
    told = task(tokenizer, data, kind="class", dropout=0.4)

    def dropped(share: Share, steps: int) -> dict:
        with closing(told.training_batches(share, {})) as batches:
            drawn = [(step, batch) for step in range(steps) for batch in batches.draw(step, 8 // share.batch_size)]
        return {(step, key): int(label) < 0 for step, batch in drawn for key, label in
                zip(batch["key"], batch["label"], strict=True)}  # fmt: skip

    whole = dropped(Share(0, 1, 8), 10)
    assert whole == dropped(Share(0, 1, 2), 10)
    assert 0.2 < sum(whole.values()) / len(whole) < 0.6
    keys = {key for _, key in whole}
    assert any(len({gone for (_, other), gone in whole.items() if other == key}) == 2 for key in keys)  # not for ever


def test_what_it_is_told_reaches_the_loss(encoded, tokenizer, text_file):
    for conditioning in ({"kind": "class"}, {"kind": "text", "tokenizer": text_file, "vocabulary": 60}):
        told = task(tokenizer, {"latents": encoded("latents")}, **conditioning)
        for parameter in told.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        batch = next(iter(told.validation_batches(SHARE)))
        losses = [
            told.training_step(told.model, {**batch, "label": torch.full((2,), label)})["cross_entropy"].item()
            for label in (0, 1, -1)
        ]
        assert len(set(losses)) == 3


def test_loss_on_predicted_frames_only(encoded, tokenizer):
    data = {"latents": encoded("latents")}
    config = PriorJobConfig.model_validate(
        {
            "run": "run",
            "data": {"workers": 0, **data},
            "tokenizer": tokenizer,
            "given_frames": 1,
            "loss_from": 1,
            "model": model(kind="frames").model_dump(),
            "training": {"steps": 1, "batch_size": 2},
        }
    )
    some = build_task(config)
    batch = next(iter(some.validation_batches(SHARE)))
    assert some.counts(batch)["cross_entropy"] == 2 * 32  # the last two of three latent frames of 4x4
    loss = some.training_step(some.model, batch)["cross_entropy"]
    sequence = some.model.order.to_sequence(batch["latent"])
    logits = some.model(sequence)[:, 16 - 4 :]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence[:, 16:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(UsageError, match=r"loss_from 3: .* fewer than the 3 there are"):
        build_task(config.model_copy(update={"loss_from": 3}))


def test_videos_without_classes_are_refused_and_frames_that_are_missing(encoded, tokenizer, shards, tmp_path):
    plain = shutil.copytree(shards, tmp_path / "plain")
    for manifest in plain.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"classes":["class0","class1"]', '"classes":[]')
                            .replace('"class0",', "").replace('"class0"', "").replace('"class1"', ""))  # fmt: skip
    with pytest.raises(UsageError, match=r"plain: its videos have no classes, which model.conditioning asks for"):
        task(tokenizer, {"kind": "clips", "shards": plain}, kind="class")
    with pytest.raises(UsageError, match="given_frames 0: this prior continues frames"):
        task(tokenizer, {"latents": encoded("latents")}, kind="frames")


def test_sets_whose_classes_differ_are_refused(tokenizer, shards, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    for manifest in other.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("class1", "classy"))
    data = {"kind": "clips", "shards": shards, "mix": {"more": {"shards": other}}}
    with pytest.raises(UsageError, match=r"other: its 2 classes are not the 2 of .*shards, which the labels number"):
        task(tokenizer, data, kind="class")
    task(tokenizer, data, kind="none")  # which is told none
