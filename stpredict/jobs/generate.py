"""Continues held-out videos: first frames given, the rest predicted; .mp4 and .gif beside the truth."""

import hashlib
import json
import logging
import math
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import ClipConfig, ClipDataConfig
from data_pipeline.disk import check_space
from data_pipeline.errors import UsageError
from data_pipeline.order import Share
from data_pipeline.shard_set import read_set
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video
from data_pipeline.video_files import write_gif, write_mp4
from stpredict.evaluation.generated import Speed
from stpredict.evaluation.pictures import side_by_side
from stpredict.exports import PriorExport, load_prior, load_tokenizer
from stpredict.jobs.config import GenerateConfig
from stpredict.priors.config import given_latent_frames
from stpredict.priors.next_block import NextBlockPrior
from stpredict.run import Progress, Run, write_atomically
from stpredict.sampling.filters import draw_tokens, uniform_numbers
from stpredict.sampling.next_block import continue_tokens
from stpredict.sampling.recording import Recording
from stpredict.sampling.stopwatch import Stopwatch
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.clips import clips_for
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)
FPS = 8  # of the pictures: slow enough to compare
ARRAYS = ("truth", "prediction", "reconstruction", "truth_tokens")


def run(config: GenerateConfig, run: Run) -> None:
    tokenizer, tokenizer_export, fingerprint = load_tokenizer(config.tokenizer)
    data = clips_for(config.data, config.tokenizer, tokenizer_export)
    prior, prior_export = load_prior(config.prior)
    _check(config, data.clip, tokenizer_export.model, prior_export, fingerprint)
    check_space(run.path, 4 * config.clips * data.clip.frames * math.prod(data.clip.size) * data.clip.channels)
    with join_ranks() as ranks:
        tokenizer.to(ranks.device)
        prior.to(ranks.device)
        speed = _continue_clips(config, data, tokenizer, prior, run, ranks)
        ranks.barrier()
        if ranks.is_main:
            keys = _merge_parts(run, ranks)
            facts = {
                "keys": keys,
                "given_frames": config.given_frames,
                "codebook_size": prior_export.codebook_size,
                "prior_step": prior_export.step,
                "speed": speed and speed.model_dump(),
            }
            write_atomically(run.samples / "index.json", json.dumps(facts, indent=1) + "\n")
            _write_pictures(run, keys[: config.pictures])


def _check(
    config: GenerateConfig, clip: ClipConfig, tokenizer: CausalCnnConfig, prior: PriorExport, fingerprint: str
) -> None:
    """UsageError where prior, tokenizer and clips do not belong together."""
    if prior.tokenizer_fingerprint != fingerprint:
        raise UsageError(
            f"{config.prior}: trained on latents of another tokenizer (fingerprint {prior.tokenizer_fingerprint[:12]}) "
            f"than {config.tokenizer} ({fingerprint[:12]}); give the one it was trained with"
        )
    grid = tokenizer.grid(clip.frames, *clip.size)
    if grid != prior.grid:
        raise UsageError(f"data.clip: makes a token grid of {grid}, {config.prior} was trained on {prior.grid}")
    given_latent_frames(config.given_frames, clip, tokenizer, prior.model)


def _continue_clips(
    config: GenerateConfig,
    data: ClipDataConfig,
    tokenizer: CausalCnnTokenizer,
    prior: NextBlockPrior,
    run: Run,
    ranks: Ranks,
) -> Speed | None:
    """Continues this rank's share of the clips and writes them to samples/part_RANK.npz. Returns how fast; None where
    it has none."""
    clips_there = min(config.clips, read_set(data.shards, "val").manifest.samples * data.clip.per_video)
    progress = Progress(run, clips_there, "clip") if ranks.is_main else None
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*ARRAYS, "index", "keys")}
    batches = clip_evaluation_batches(
        data.model_copy(update={"clip": data.clip.unaugmented}),
        "val",
        seed=config.seed,
        share=Share(ranks.rank, ranks.size, config.batch_size),
        samples=range(config.clips),
    )
    watch = Stopwatch(ranks.device)
    recording = Recording() if ranks.device.type == "cuda" else None  # of full batches; others are few
    done = clips_timed = batches_timed = 0
    for batch in batches:
        real = batch["weight"] > 0
        if not real.any():
            continue
        clips, keys = batch["clip"][real], list(compress(batch["key"], real))
        video = to_video(clips.to(ranks.device))
        tokens = tokenizer.encode(video)  # for the reconstruction: only the given frames go into the prompt
        seeds = [_seed(config.seed, key) for key in keys]
        recorded = recording if len(keys) == config.batch_size else None
        if not batches_timed:
            _warm_up(config, tokenizer, prior, video, tokens, recorded)
        with watch.timing("tokenizing"):
            given = tokenizer.encode(video[:, :, : config.given_frames])
        with watch.timing("sampling"):
            predicted = continue_tokens(prior, given, config.sampling, seeds, recording=recorded)
        with watch.timing("decoding"):
            decoded = tokenizer.decode(predicted)
        batches_timed, clips_timed = batches_timed + 1, clips_timed + len(keys)
        prediction, reconstruction = (to_clip(frames).cpu() for frames in (decoded, tokenizer.decode(tokens)))
        prediction[:, : config.given_frames] = clips[:, : config.given_frames]
        arrays = (clips, prediction, reconstruction, tokens.cpu(), batch["index"][real], keys)
        for name, array in zip(parts, arrays, strict=True):
            parts[name].append(np.asarray(array))
        done += len(keys) * ranks.size
        if progress:
            progress.update(min(clips_there, done), "continuing")
    run.samples.mkdir(parents=True, exist_ok=True)
    merged = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    np.savez(run.samples / f"part_{ranks.rank}.npz", **merged)
    if not batches_timed:
        return None
    speed = Speed(
        clips=clips_timed,
        predicted_frames=clips_timed * (data.clip.frames - config.given_frames),
        batches=batches_timed,
        batch_size=config.batch_size,
        forward_steps=len(prior.order.sizes) - prior.order.blocks_in(given[0].numel()),
        sampling_s=watch.seconds["sampling"],
        whole_s=sum(watch.seconds.values()),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
    )
    log.info("%s", speed.in_words())
    return speed


@torch.no_grad()
def _warm_up(
    config: GenerateConfig,
    tokenizer: CausalCnnTokenizer,
    prior: NextBlockPrior,
    video: Tensor,
    tokens: Tensor,
    recording: Recording | None,
) -> None:
    """The first forwards of a process are slow (kernels are loaded and chosen, memory is found, steps are recorded):
    they are done before the clock starts, with shapes as in what follows."""
    given = tokenizer.encode(video[:, :, : config.given_frames])
    for _ in range(2 if recording else 0):
        continue_tokens(prior, given, config.sampling, range(len(given)), recording=recording)
    sequence, caches = prior.order.to_sequence(tokens), prior.make_caches(len(tokens))
    start = given[0].numel()
    prompt, *blocks = (
        sequence[:, :start],
        *sequence[:, start:].split(prior.order.sizes[prior.order.blocks_in(start) :], 1),
    )
    for block in (prompt, *blocks[:-1][:1]):
        logits = prior(block, caches=caches)
        draw_tokens(logits, config.sampling, uniform_numbers(range(len(tokens)), logits.shape[1], logits.device))
    tokenizer.decode(tokens)


def _seed(seed: int, key: str) -> int:
    """A sample's own seed, so that its video does not depend on the batch or the rank that it fell into."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def _merge_parts(run: Run, ranks: Ranks) -> list[str]:
    """Puts the ranks' clips in the order of the shard set; returns their keys."""
    paths = [run.samples / f"part_{rank}.npz" for rank in range(ranks.size)]
    parts = [part for part in map(np.load, paths) if "keys" in part]
    if not parts:
        raise UsageError(f"{run.path}: not one held-out clip could be read; look at the log for their names")
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    for name in ARRAYS:
        np.save(run.samples / f"{name}.npy", np.concatenate([part[name] for part in parts])[order])
    keys = np.concatenate([part["keys"] for part in parts])[order].tolist()
    for path in paths:
        path.unlink()
    return keys


def _write_pictures(run: Run, keys: list[str]) -> None:
    clips = {name: np.load(run.samples / f"{name}.npy", mmap_mode="r") for name in ARRAYS[:3]}
    for number, key in enumerate(keys):
        frames = side_by_side({name: array[number] for name, array in clips.items()}, scale=2)
        write_mp4(run.samples / f"{number:03d}_{key}.mp4", frames, FPS)
        write_gif(run.samples / f"{number:03d}_{key}.gif", frames, FPS)
    log.info("%d pictures in %s", len(keys), run.samples)
