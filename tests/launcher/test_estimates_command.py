"""``stpredict estimate``: what it loads, what it answers, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_pipeline.errors import UsageError, UserError
from launcher.estimates import Options, _filled, estimate, load_training, load_trainings
from launcher.pipeline import load_pipeline
from launcher.study import load_study
from tests.processes import bounded, succeeding

PRIOR = Path("configs/priors/demo.yaml")
LATENT = ["latent.grid=[9,8,8]", "latent.codebook_size=1024"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launcher", "estimate", *arguments]


@pytest.fixture(scope="module")
def answer() -> dict:
    """Of the demo's prior, two GPUs of a node."""
    return json.loads(
        succeeding(command(str(PRIOR), *LATENT, "--gpus-per-node", "2", "--clips", "1000", "--json")).stdout
    )


def test_json_is_the_whole_answer(answer):
    model = load_training(PRIOR, LATENT).model
    of_layer = model.width * (4 * model.width + 3 * model.mlp_width)
    # Layers with two norms each, the last norm, embedding and head.
    norms = (2 * model.layers + 1) * model.width
    assert answer["parameters"] == model.layers * of_layer + norms + 2 * 1024 * model.width
    assert answer["macs_forward"] == answer["flops_forward"] / 2
    assert (answer["kind"], answer["tokens_per_sample"]) == ("prior", 576)
    assert answer["machine"]["ranks"] == 2
    assert answer["utilization"]["source"] == "assumed"
    assert answer["recommended"] in answer["ways"]
    for way in answer["ways"]:
        assert way["memory_bytes"] == sum(v for k, v in way["memory"].items() if k not in ("moment", "host"))
        assert way["sent_bytes_per_step"] == pytest.approx(sum(c["sent_bytes"] for c in way["collectives"]))
        assert way["gpu_hours"] == pytest.approx(way["days"] * 24 * 2)
        assert way["fits"] is (way["memory_bytes"] <= answer["machine"]["usable_bytes"])
    assert answer["latents"]["per_clip_bytes"] == 576 * 2
    assert answer["disk"]["checkpoint"] > 12 * answer["parameters"]


def test_a_forecaster_has_samples_and_no_tokens_and_the_multiply_adds_of_papers(capsys):
    path = Path("configs/forecasters/taxibj_convnext_svq.yaml")
    estimate(path, [], Options(nodes=1, gpus_per_node=2), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["parameters"], found["tokens_per_sample"]) == ("forecaster", 9_457_778, 0)
    assert found["macs_forward"] / 1e9 == pytest.approx(3.72, rel=0.005)
    assert found["flops_forward"] / 2e9 == pytest.approx(2.12, rel=0.01)
    estimate(path, [], Options(nodes=1, gpus_per_node=2), as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "token" not in shown
    assert "as papers count it, 3.72 GMAC" in shown
    assert re.search(r"[\d,]+ samples/s 63,941 steps: ", shown)


def test_a_table_names_what_is_recommended_and_what_is_assumed(answer):
    text = succeeding(command(str(PRIOR), *LATENT, "--gpus-per-node", "2", "--gpu", "h100", "--mfu", "0.5")).stdout
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(text.split())
    assert f"demo.yaml: {answer['parameters']:,} parameters" in plain
    assert "1 node x 2 NVIDIA H100 80GB HBM3 (asked for)" in plain
    assert re.search(r"resources\.processes=2 training\.zero_stage=\d \\ training\.micro_batch_size=4", plain)
    assert "expect far longer ones" in plain  # of a model as small as this
    assert "- MFU 0.5 of the model's own FLOPs" in plain
    assert "450 GB/s from each GPU to the others of its node (NVLink, datasheet)" in plain


def test_a_pipelines_prior_has_the_latents_of_its_tokenizer():
    """Also where the pipeline and its jobs leave values open, which an estimate does not need."""
    path = Path("configs/pipelines/demo_videos.yaml")
    trainings = load_trainings(load_pipeline(path, _filled(path, []))[1])
    assert list(trainings) == ["tokenizer", "prior"]
    tokenizer, prior = trainings["tokenizer"], trainings["prior"]
    assert prior.latent.codebook_size == tokenizer.model.codebook_size
    assert prior.latent.grid == tokenizer.model.grid(17, 64, 64)
    shorter = ["jobs.latents.set.data.clip.frames=9"]
    cut = load_trainings(load_pipeline(path, _filled(path, shorter))[1])["prior"]
    assert cut.latent.grid == tokenizer.model.grid(9, 64, 64)


def test_a_pipeline_and_a_study_are_summed_up(capsys):
    estimate(Path("configs/pipelines/nbp_small.yaml"), [], Options(clips=100), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["trainings"]] == ["tokenizer", "prior"]
    assert found["gpu_hours"] == pytest.approx(sum(row["gpu_hours"] for row in found["trainings"]))
    assert found["disk_bytes"] == sum(row["disk_bytes"] for row in found["trainings"]) + found["latents"]["bytes"]
    assert found["not_counted"] == ["encode", "evaluate", "generate", "report", "shard"]

    path = Path("configs/studies/nbp_sizes.yaml")
    estimate(path, [], Options(nodes=1), as_json=True)
    found = json.loads(capsys.readouterr().out)
    study = load_study(path, _filled(path, []))
    assert found["trials"] == len(study.trials)
    rows = [row for row in found["trainings"] if row["name"].endswith("prior")]
    assert {row["ranks"] for row in rows} == {8}
    assert found["days"] <= sum(row["days"] for row in found["trainings"])
    assert found["days"] >= max(row["days"] for row in rows)


def test_a_priors_latents_come_from_a_tokenizer_that_is_there(tmp_path):
    tokenizer = yaml.safe_load(Path("configs/tokenizers/demo.yaml").read_text())
    tokenizer["data"]["shards"] = "nowhere"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tokenizer))
    run = load_training(tmp_path / "config.yaml")
    prior = load_training(PRIOR, [f"tokenizer={tmp_path}"])
    clip = run.data.clip
    assert prior.latent.grid == run.model.grid(clip.frames, *clip.size)
    fewer = ["data.kind=clips", "data.shards=nowhere", "data.clip.frames=9"]
    assert load_training(PRIOR, [f"tokenizer={tmp_path}", *fewer]).latent.grid == run.model.grid(9, *clip.size)


def test_a_prior_on_clips_pays_for_its_tokenizer_or_is_said_not_to(tmp_path, capsys):
    tokenizer = yaml.safe_load(Path("configs/tokenizers/demo.yaml").read_text())
    tokenizer["data"]["shards"] = "nowhere"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tokenizer))
    clips = ["data.kind=clips", "data.shards=nowhere"]

    def asked(*overrides: str) -> dict:
        estimate(PRIOR, [*clips, *overrides], Options(gpus_per_node=2), as_json=True)
        return json.loads(capsys.readouterr().out)

    there, missing = asked(f"tokenizer={tmp_path}"), asked(*LATENT)
    assert there["recommended"]["tokenizing_s"] > 0
    assert there["recommended"]["memory"]["tokenizer"] > 0
    assert not there["without_tokenizer"]
    assert missing["without_tokenizer"]
    assert missing["recommended"]["tokenizing_s"] == missing["recommended"]["memory"]["tokenizer"] == 0
    estimate(PRIOR, [*clips, *LATENT], Options(gpus_per_node=2), as_json=False)
    assert "is in neither time nor memory" in capsys.readouterr().out.replace("\n", "")


def test_a_tokenizers_losses_are_in_memory_disk_and_time(capsys):
    path, found = Path("configs/tokenizers/demo.yaml"), []
    for changes in ([], ["loss.adversarial={}", "loss.perceptual={}"]):  # of which no weights are needed
        estimate(path, changes, Options(gpus_per_node=1), as_json=True)
        found.append(json.loads(capsys.readouterr().out))
    without, with_them = (one["recommended"]["memory"] for one in found)
    vgg, heads, constants = 14_714_688, 64 + 128 + 256 + 512 + 512, 6
    discriminator = 11_057_857 - 2 * 64 * 64  # of one channel
    assert with_them["networks"] == 4 * (vgg + heads + constants)
    assert with_them["discriminator"] == 5 * 4 * discriminator
    assert without["networks"] == without["discriminator"] == 0
    assert found[1]["judging"]["parameters"] == discriminator
    assert found[0]["judging"] is None
    assert found[1]["recommended"]["judging_s"] > found[0]["recommended"]["judging_s"] == 0
    assert with_them["activations"] > without["activations"]
    assert found[1]["disk"]["checkpoint"] - found[0]["disk"]["checkpoint"] == pytest.approx(
        12 * discriminator, rel=1e-3
    )
    assert found[1]["flops_forward"] == found[0]["flops_forward"]
    estimate(path, ["loss.adversarial={}"], Options(), as_json=False)
    assert f"a discriminator of {discriminator:,} parameters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((PRIOR, [], Options()), r"there is no tokenizer; give tokenizer=RUN, or latent\.grid="),
        (("configs/data/folder.yaml", [], Options()), "has kind shard: trainings are estimated"),
        ((PRIOR, LATENT, Options(gpu="a100-90g")), "did you mean a100-80g"),
        ((PRIOR, LATENT, Options(mfu=1.5)), r"--mfu 1\.5: a share of the GPU's peak"),
        ((PRIOR, LATENT, Options(mfu=0.5, mfu_from=Path("runs/x"))), "give --mfu or --mfu-from, not both"),
        ((PRIOR, LATENT, Options(nodes=3)), "--nodes 3: .* does not divide among 3 nodes; 1, 2, 4 or 8 would do"),
        ((PRIOR, LATENT, Options(nodes=2, gpus_per_node=8)), "--gpus-per-node 8: .* on 2 nodes; 1, 2 or 4 would do"),
        (("configs/tokenizers/demo.yaml", [], Options(clips=9)), "--clips is for the cache of latents that a prior"),
        (("configs/studies/nbp_sizes.yaml", [], Options(clips=9)), "--clips: .*nbp_sizes.yaml is a study"),
        ((PRIOR, LATENT, Options(nodes=1, days=3)), "leave out --nodes"),
        (("configs/studies/nbp_sizes.yaml", [], Options(days=3)), "--days: .*nbp_sizes.yaml has several trainings"),
        ((PRIOR, LATENT, Options(tokens=-1)), "--tokens -1: give a finite number above 0"),
        ((PRIOR, LATENT, Options(tokens=float("inf"))), "--tokens inf: give a finite number above 0"),
        ((PRIOR, [*LATENT, "training.precision=fp8"], Options()), r"'training.precision' is fp8; give 'auto'"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    path, overrides, options = arguments
    with pytest.raises(UsageError, match=said) as refused:
        estimate(Path(path), overrides, options, as_json=False)
    assert "\n" not in str(refused.value)


def test_an_mfu_of_a_run_is_that_of_its_computation(tmp_path, capsys):
    """What a run on one A100 says is taken as it is. On eight, a part of its steps was communication."""
    sizes = ["model.width=1024", "model.heads=16", "model.layers=4", "training.zero_stage=1"]
    config = OmegaConf.merge(OmegaConf.load(PRIOR), OmegaConf.from_dotlist([*LATENT, *sizes, "resources.processes=8"]))
    OmegaConf.save(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mfu": 0.1}\n')

    def utilization(*overrides: str) -> dict:
        estimate(tmp_path / "config.yaml", overrides, Options(mfu_from=tmp_path, gpu="a100"), as_json=True)
        return json.loads(capsys.readouterr().out)

    on_eight = utilization()
    assert on_eight["utilization"]["mfu_of_run"] == 0.1
    assert on_eight["utilization"]["mfu"] > 0.1
    # The same again is as long as it was, whatever was recommended.
    flops = 3 * on_eight["flops_forward"] * on_eight["batch_size"]
    assert on_eight["configured"]["step_s"] == pytest.approx(flops / (8 * 312e12 * 0.1))
    (tmp_path / "environment.json").write_text('{"gpus": ["NVIDIA H100 80GB HBM3"]}')
    assert 0.1 < utilization()["utilization"]["mfu"] != on_eight["utilization"]["mfu"]
    config.resources.processes = 1
    OmegaConf.save(config, tmp_path / "config.yaml")
    assert utilization()["utilization"]["mfu"] == pytest.approx(0.1)


def test_a_run_without_mfu_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has no mfu"):
        estimate(PRIOR, LATENT, Options(mfu_from=tmp_path), as_json=False)


def test_refusals_and_help_import_no_torch():
    code = (
        "import sys\nfrom launcher.cli import main\n"
        "sys.argv[1:] = ['estimate', 'configs/priors/demo.yaml', '--gpu', 'h1000']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\nassert 'torch' not in sys.modules"
    )
    result = bounded([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr
    assert "--gpu h1000: not known; did you mean h100" in result.stderr


def test_trials_of_other_optimizers_take_other_disk(capsys):
    kinds = ["grid.seed.key=prior.set.training.optimizer.kind", "grid.seed.values=[adam, sgd]"]
    estimate(Path("configs/studies/nbp_sizes.yaml"), kinds, Options(nodes=1), as_json=True)
    rows = json.loads(capsys.readouterr().out)["trainings"]
    adam, sgd = (row["disk_bytes"] for row in rows if row["name"].startswith("xl-"))
    assert sgd < 0.5 * adam  # no moments
