"""Caches latents: every clip of a shard set through a trained tokenizer, into latent shards."""

import logging
import math
from itertools import compress

import numpy as np

from data_pipeline.config import ClipDataConfig
from data_pipeline.disk import check_space
from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.storage import child
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_video
from stpredict.config import canonical_json
from stpredict.exports import load_tokenizer
from stpredict.jobs.clips import clips_for
from stpredict.jobs.config import EncodeConfig
from stpredict.run import Progress, Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)


def run(config: EncodeConfig, run: Run) -> None:
    tokenizer, export, fingerprint = load_tokenizer(config.tokenizer)
    data = clips_for(config.data, config.tokenizer, export)
    passes = {"train": config.passes, "val": 1}
    samples = {split: read_manifest(child(data.shards, split)).samples * passes[split] for split in passes}
    tokens = math.prod(tokenizer.config.grid(data.clip.frames, *data.clip.size)) * sum(samples.values())
    check_space(config.run, 2 * tokens * np.min_scalar_type(tokenizer.config.codebook_size - 1).itemsize)
    with join_ranks() as ranks:
        tokenizer.to(ranks.device)
        progress = Progress(run, sum(samples.values()), "clip") if ranks.is_main else None
        done = 0
        for split, times in passes.items():
            writer = _writer(config, data, split, times, tokenizer, fingerprint, ranks)
            if not writer.finished:
                with writer:
                    _encode(config, data, split, times, tokenizer, writer, ranks, progress, done)
            ranks.barrier()
            if ranks.is_main:
                manifest = merge(config.run / split)
                log.info("%s: %d clips of %s tokens", config.run / split, manifest.samples, manifest.grid)
            done += samples[split]


def _writer(
    config: EncodeConfig,
    data: ClipDataConfig,
    split: str,
    passes: int,
    tokenizer: CausalCnnTokenizer,
    fingerprint: str,
    ranks: Ranks,
) -> LatentWriter:
    clips = read_manifest(child(data.shards, split))
    return LatentWriter(
        config.run / split,
        grid=tokenizer.config.grid(data.clip.frames, *data.clip.size),
        codebook_size=tokenizer.config.codebook_size,
        fingerprint=fingerprint,
        clips_per_member=config.clips_per_member,
        shards=latent_shards(clips.samples * passes, config.shards, ranks.size),
        rank=ranks.rank,
        world_size=ranks.size,
        plan=f"{canonical_json(data)} seed {config.seed} passes {passes} of {clips.model_dump_json()}",
        classes=clips.classes,
        clip=data.clip,
    )


def _encode(
    config: EncodeConfig,
    data: ClipDataConfig,
    split: str,
    passes: int,
    tokenizer: CausalCnnTokenizer,
    writer: LatentWriter,
    ranks: Ranks,
    progress: Progress | None,
    done: int,
) -> None:
    """This rank's share of a split, ``passes`` times; ``done`` clips of other splits came before."""
    for number in range(passes):
        batches = clip_evaluation_batches(
            data,
            split,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.size,
            batch_size=config.batch_size,
            epoch=number,
        )
        for batch in batches:
            real = batch["weight"] > 0
            if not real.any():
                continue
            tokens = tokenizer.encode(to_video(batch["clip"][real].to(ranks.device)))
            keys = [f"{key}-{number}" for key in compress(batch["key"], real)]
            writer.append(tokens.cpu().numpy(), keys, batch["label"][real].tolist())
            done += len(keys) * ranks.size
            if progress:
                progress.update(min(done, progress.steps), f"encoding {split}")
