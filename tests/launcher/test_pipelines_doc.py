import re
from pathlib import Path

from launcher.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]


def test_the_pipeline_of_the_docs_is_one(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "pipelines.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "pipelines").mkdir()
    for name in ("data", "tokenizers"):
        (tmp_path / name).symlink_to(ROOT / "configs" / name)
    path = tmp_path / "pipelines" / "mine.yaml"
    path.write_text(text)
    pipeline, (shards, tokenizer) = load_pipeline(
        path,
        [
            "vars.videos=/some/folder",
            "jobs.tokenizer.set.training.steps=5000",
            'jobs.shards.set.resources.time="1:00:00"',
        ],
    )
    assert (pipeline.run, shards.array, tokenizer.needs) == (Path("runs/mine"), 4, ("shards",))
    assert str(shards.config.source.path) == "/some/folder"
    assert shards.config.resources.time == "1:00:00"
    assert tokenizer.config.data.shards == "runs/mine/shards"
    assert (tokenizer.config.model.video_channels, tokenizer.config.training.steps) == (3, 5000)
