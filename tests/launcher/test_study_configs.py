"""Every study and prior of configs/ is what it says: it loads, and each of its models can be built."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.estimates import load_training
from launcher.study import load_study
from stpredict.config import read_yaml
from stpredict.estimates.planned import plan_training
from stpredict.jobs.config import PriorJobConfig

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.stem for path in (ROOT / "configs/studies").glob("nbp_*.yaml"))
FULL = [name for name in STUDIES if not name.endswith("_tiny")]
TINY_LATENT = {"grid": (9, 8, 8), "codebook_size": 1024}


def jobs_of(name: str):
    path = ROOT / f"configs/studies/{name}.yaml"
    names = [] if name.endswith("_tiny") else OmegaConf.missing_keys(read_yaml(path))
    return load_study(path, [f"{key}=/{key}" for key in names])


def test_the_study_of_the_docs_is_one(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/studies.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "studies").mkdir()
    (tmp_path / "priors").symlink_to(ROOT / "configs/priors")
    path = tmp_path / "studies/mine.yaml"
    path.write_text(text)
    study, _, jobs = load_study(path, ["vars.tokenizer=/t", "vars.latents=/l"])
    assert [len(axis.values) for axis in study.grid.values()] == [2, 2, 2]
    assert len([job for job in jobs if isinstance(job.config, PriorJobConfig)]) == 8


def test_each_study_has_a_twin_that_varies_the_same_axes():
    assert len(FULL) == 4
    for name in FULL:
        study, twin = jobs_of(name)[0], jobs_of(f"{name}_tiny")[0]
        assert set(study.trial) == set(twin.trial)
        assert {axis for axis in study.grid if len(study.grid[axis].values) > 1} <= set(twin.grid), name


@pytest.mark.parametrize("name", STUDIES)
def test_the_model_of_every_trial_can_be_built(name):
    _, _, jobs = jobs_of(name)
    priors = [job.config for job in jobs if isinstance(job.config, PriorJobConfig)]
    latent = {"latent": TINY_LATENT} if name.endswith("_tiny") else {}
    sizes = set()
    for config in priors:
        built = PriorJobConfig.model_validate({**config.model_dump(), **latent})
        sizes.add(sum(p.numel() for p in plan_training(built).task.model.parameters()))
    assert len(sizes) == (1 if "block" in name else 3 if name in FULL else len(jobs_of(name)[0].grid["size"].values))


@pytest.mark.parametrize(
    ("name", "layers", "width", "mlp_width"),
    [("xl", 24, 1536, 4096), ("xxl", 24, 2048, 5504), ("3b", 32, 3072, 8192)],
)
def test_the_published_priors_have_their_published_sizes(name, layers, width, mlp_width):
    config = load_training(ROOT / f"configs/priors/nbp_{name}_k600.yaml", [])
    parameters = sum(p.numel() for p in plan_training(config).task.model.parameters())
    of_layer = 4 * width**2 + 3 * width * mlp_width + 2 * width  # qkv and output, SwiGLU, two norms
    assert parameters == layers * of_layer + width + 2 * 64_000 * width
