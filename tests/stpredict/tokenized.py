"""A small trained-looking tokenizer and a shard set of videos that no two clips of look alike."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data_pipeline.config import ClipConfig
from data_pipeline.video_files import write_mp4
from stpredict.config import as_yaml
from stpredict.exports import TokenizerExport
from stpredict.jobs import shard
from stpredict.jobs.config import ShardConfig
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig

CLIP = ClipConfig(frames=5, size=(32, 32), start="random")
GRID = (3, 4, 4)
TRAIN, VAL = 22, 3


def make_tokenizer(folder: Path, seed: int = 0) -> Path:
    """An export; weights of that seed."""
    torch.manual_seed(seed)
    model = CausalCnnConfig(
        patch=8, channels=(16, 16), blocks=(0, 1), strides=((2, 1, 1),), middle_blocks=0, groups=4, levels=(4, 4, 4, 4)
    )
    folder.mkdir(parents=True)
    save_file(CausalCnnTokenizer(model).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(as_yaml(TokenizerExport(clip=CLIP, model=model)))
    return folder


def make_shards(folder: Path) -> Path:
    """``folder``/shards: videos of 12 frames of smooth noise in train and val."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for index in range(count):
            coarse = rng.integers(0, 256, (12, 4, 4, 3), np.uint8)
            frames = coarse.repeat(8, axis=1).repeat(8, axis=2)
            write_mp4(folder / "videos" / split / f"class{index % 2}" / f"v{index:02d}.mp4", frames, fps=10)
    run = Run(folder / "shards")
    source = {"kind": "folder", "path": folder / "videos"}
    run.update_status(kind="shard")
    shard.run(ShardConfig(run=run.path, source=source, max_shards=4), run)
    return run.path
