"""What a tokenizer makes of held-out videos: their clips, reconstructions and tokens as arrays, and pictures.

The arrays are written clip by clip, so that fifty thousand clips, as a published rFVD takes, need no memory.
"""

import logging
from itertools import compress

import numpy as np

from data_pipeline.disk import check_space
from data_pipeline.order import Share
from data_pipeline.shard_set import read_set
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video
from stpredict.evaluation.pictures import write_side_by_side
from stpredict.evaluation.reconstructed import ARRAYS, ReconstructedIndex
from stpredict.exports import load_tokenizer
from stpredict.jobs.clip_arrays import ClipArray, keep_read
from stpredict.jobs.config import ReconstructConfig
from stpredict.run import Progress, Run, write_atomically
from stpredict.tokenizers.clips import clips_for
from stpredict.training.ranks import join_ranks

log = logging.getLogger(__name__)


def run(config: ReconstructConfig, run: Run) -> None:
    tokenizer, export, _ = load_tokenizer(config.tokenizer)
    data = clips_for(config.data, config.tokenizer, export)
    data = data.model_copy(update={"clip": data.clip.unaugmented})
    config.tiling.check(export.model, "tiling")
    there = read_set(data.shards, "val").manifest.samples * data.clip.per_video
    count = min(config.clips or there, there)
    clip = (data.clip.frames, *data.clip.size, data.clip.channels)
    grid = export.model.grid(data.clip.frames, *data.clip.size)
    shapes = {"truth": clip, "reconstruction": clip, "truth_tokens": grid}
    types = dict.fromkeys(ARRAYS, np.dtype(np.uint8))
    types["truth_tokens"] = np.min_scalar_type(export.model.codebook_size - 1)
    files = {name: ClipArray(run.samples / f"{name}.npy", count, shapes[name], types[name]) for name in ARRAYS}
    check_space(run.path, sum(file.bytes for file in files.values()))
    with join_ranks() as ranks:
        if ranks.is_main:
            run.samples.mkdir(parents=True, exist_ok=True)
            for file in files.values():
                file.create()
        ranks.barrier()
        tokenizer.to(ranks.device)
        batches = clip_evaluation_batches(
            data,
            "val",
            seed=config.seed,
            share=Share(ranks.rank, ranks.size, config.batch_size),
            samples=range(count),
        )
        progress = Progress(run, count, "clip") if ranks.is_main else None
        keys: dict[int, str] = {}
        for batch in batches:
            real = batch["weight"] > 0
            rows = batch["index"][real].tolist()
            if not rows:
                continue
            tokens = tokenizer.encode(to_video(batch["clip"][real].to(ranks.device)), config.tiling)
            made = to_clip(tokenizer.decode(tokens, config.tiling))
            for file, values in zip(files.values(), (batch["clip"][real], made, tokens), strict=True):
                file.write(rows, values.cpu().numpy())
            keys |= dict(zip(rows, compress(batch["key"], real), strict=True))
            if progress:
                progress.update(min(count, len(keys) * ranks.size), "reconstructing")
        keys = {row: key for part in ranks.gather(keys) for row, key in part.items()}
        if ranks.is_main:
            arrays = {name: np.load(file.path, mmap_mode="r") for name, file in files.items()}
            _finish(config, run, arrays, dict(sorted(keys.items())), export.model.codebook_size, export.step)
        ranks.barrier()


def _finish(
    config: ReconstructConfig,
    run: Run,
    arrays: dict[str, np.ndarray],
    keys: dict[int, str],
    codebook_size: int,
    step: int,
) -> None:
    keep_read(run.samples, arrays, list(keys))
    index = ReconstructedIndex(keys=list(keys.values()), codebook_size=codebook_size, tokenizer_step=step)
    write_atomically(run.samples / "index.json", index.model_dump_json(indent=1) + "\n")
    write_side_by_side(run.samples, index.keys[: config.pictures], {name: arrays[name] for name in ARRAYS[:2]})
    log.info("%d clips and their reconstructions in %s", len(keys), run.samples)
