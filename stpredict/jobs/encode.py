"""Caches latents: every clip of a shard set through a trained tokenizer, into latent shards."""

import logging

from data_pipeline.errors import UsageError
from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_video
from stpredict.config import canonical_json
from stpredict.exports import load_tokenizer
from stpredict.jobs.config import EncodeConfig
from stpredict.run import Progress, Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)


def run(config: EncodeConfig, run: Run) -> None:
    passes = {"train": config.passes, "val": 1}
    samples = {split: read_manifest(config.data.shards / split).samples * passes[split] for split in passes}
    tokenizer, _, fingerprint = load_tokenizer(config.tokenizer)
    with join_ranks() as ranks:
        tokenizer.to(ranks.device)
        progress = Progress(run, sum(samples.values()), "clip") if ranks.is_main else None
        done = 0
        for split in passes:
            _encode_split(config, split, passes[split], tokenizer, fingerprint, ranks, progress, done)
            done += samples[split]


def _encode_split(
    config: EncodeConfig,
    split: str,
    passes: int,
    tokenizer: CausalCnnTokenizer,
    fingerprint: str,
    ranks: Ranks,
    progress: Progress | None,
    done: int,
) -> None:
    clips = read_manifest(config.data.shards / split)
    try:
        grid = tokenizer.config.grid(config.data.clip.frames, *config.data.clip.size)
    except ValueError as error:
        raise UsageError(f"data.clip: {error}") from error
    writer = LatentWriter(
        config.run / split,
        grid=grid,
        codebook_size=tokenizer.config.codebook_size,
        fingerprint=fingerprint,
        clips_per_member=config.clips_per_member,
        shards=latent_shards(clips.samples * passes, config.shards, ranks.size),
        rank=ranks.rank,
        world_size=ranks.size,
        plan=f"{canonical_json(config.data)} seed {config.seed} passes {passes} of {clips.model_dump_json()}",
        classes=clips.classes,
        clip=config.data.clip,
    )
    if not writer.finished:
        with writer:
            for number in range(passes):
                batches = clip_evaluation_batches(
                    config.data,
                    split,
                    seed=config.seed,
                    rank=ranks.rank,
                    world_size=ranks.size,
                    batch_size=config.batch_size,
                    epoch=number,
                )
                for batch in batches:
                    real = batch["weight"] > 0
                    tokens = tokenizer.encode(to_video(batch["clip"][real].to(ranks.device)))
                    keys = [f"{key}-{number}" for key, keep in zip(batch["key"], real, strict=True) if keep]
                    writer.append(tokens.cpu().numpy(), keys, batch["label"][real].tolist())
                    done += len(keys) * ranks.size
                    if progress:
                        progress.update(min(done, progress.steps or done), f"encoding {split}")
    ranks.barrier()
    if ranks.is_main:
        manifest = merge(config.run / split)
        log.info("%s: %d clips of %s tokens", config.run / split, manifest.samples, grid)
