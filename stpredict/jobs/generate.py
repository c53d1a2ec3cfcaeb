"""Continues held-out videos: first frames given, the rest predicted; .mp4 and .gif beside the truth. Without given
frames, makes videos from nothing (``samples.py``)."""

import json
import logging
import math
from itertools import compress
from pathlib import Path

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
from stpredict.evaluation.generated import Speed
from stpredict.evaluation.pictures import write_side_by_side
from stpredict.exports import PriorExport, load_prior, load_tokenizer
from stpredict.jobs.config import GenerateConfig
from stpredict.jobs.generated_parts import merge_parts, seed_of, write_part
from stpredict.jobs.samples import class_numbers, make_samples
from stpredict.priors.config import given_latent_frames
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.prefixes import Prefixes, prefixes, text_tokenizer_hash
from stpredict.run import Progress, Run, write_atomically
from stpredict.sampling.next_block import continue_tokens, forward_steps, warm_up
from stpredict.sampling.recording import Recording
from stpredict.sampling.stopwatch import Stopwatch
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.clips import clips_for
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.precision import TYPES
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)
ARRAYS = ("truth", "prediction", "reconstruction", "truth_tokens")


def run(config: GenerateConfig, run: Run) -> None:
    tokenizer, tokenizer_export, fingerprint = load_tokenizer(config.tokenizer)
    prior, prior_export = load_prior(config.prior)
    data = clips_for(config.data, config.tokenizer, tokenizer_export) if config.data else None
    clip = data.clip if data else tokenizer_export.clip
    _check(config, clip, tokenizer_export.model, prior_export, fingerprint)
    config.tiling.check(tokenizer_export.model, "tiling")
    told = prefixes_of(config, prior_export)
    numbers = class_numbers(config, prior_export) if data is None else []
    labels = _labels(config.prior, data, prior_export) if data and told else None
    check_space(run.path, 4 * config.clips * clip.frames * math.prod(clip.size) * clip.channels)
    with join_ranks() as ranks:
        tokenizer.to(ranks.device)
        prior.to(ranks.device, TYPES[config.precision])
        if data is None:
            make_samples(config, numbers, tokenizer, prior, prior_export, told, run, ranks)
            return
        speed = _continue_clips(config, data, tokenizer, prior, told, labels, run, ranks)
        ranks.barrier()
        if ranks.is_main:
            keys = merge_parts(run, ranks.size, ARRAYS)
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
    if config.data and grid != prior.grid:
        raise UsageError(f"data.clip: makes a token grid of {grid}, {config.prior} was trained on {prior.grid}")
    given_latent_frames(config.given_frames, clip, tokenizer, prior.model)


def prefixes_of(config: GenerateConfig, prior: PriorExport) -> Prefixes | None:
    """What the prior is told, of each of its classes. UsageError where it cannot be, or not with guidance."""
    if config.sampling.guidance != 1 and not (prior.model.labelled and prior.model.conditioning.dropout):
        why = "was told the class of every sample: train it with model.conditioning.dropout"
        raise UsageError(
            f"sampling.guidance {config.sampling.guidance:g}: {config.prior} "
            f"{why if prior.model.labelled else 'is told no class'}; leave guidance at 1"
        )
    text = getattr(prior.model.conditioning, "tokenizer", None)
    if text and text_tokenizer_hash(text) != prior.text_tokenizer:
        raise UsageError(f"{text}: is not the file that {config.prior} was trained with; put that one there again")
    return prefixes(prior.model, prior.classes)


def _labels(where: Path, data: ClipDataConfig, prior: PriorExport) -> Tensor:
    """Of each class of the clips its number in the prior, and at the end, for those without one, -1. UsageError for a
    class that the prior does not know."""
    names = read_set(data.shards, "val").manifest.classes
    for name in names:
        if name not in prior.classes:
            raise UsageError(f"{data.shards}: has the class {name!r}, which {where} does not know")
    return torch.tensor([*map(prior.classes.index, names), -1])


def _continue_clips(
    config: GenerateConfig,
    data: ClipDataConfig,
    tokenizer: CausalCnnTokenizer,
    prior: NextBlockPrior,
    prefixes: Prefixes | None,
    numbers: Tensor | None,
    run: Run,
    ranks: Ranks,
) -> Speed | None:
    """Continues this rank's share of the clips and writes them to samples/part_RANK.npz. Returns how fast; None where
    it has none. ``numbers``: the class of each label, in the prior."""
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
        # For the reconstruction: only the given frames go into the prompt.
        tokens = tokenizer.encode(video, config.tiling)
        seeds = [seed_of(config.seed, key) for key in keys]
        recorded = recording if len(keys) == config.batch_size else None
        told = ()
        if prefixes:
            labels = numbers[batch["label"][real]].to(ranks.device)
            told = prefixes.of(labels), prefixes.of(torch.full_like(labels, -1))
        if not batches_timed:
            given = tokenizer.encode(video[:, :, : config.given_frames], config.tiling)
            tokenizer.decode(warm_up(recorded, prior, given, config.sampling, seeds, *told), config.tiling)
        with watch.timing("tokenizing"):
            given = tokenizer.encode(video[:, :, : config.given_frames], config.tiling)
        with watch.timing("sampling"):
            predicted = continue_tokens(prior, given, config.sampling, seeds, *told, recording=recorded)
        with watch.timing("decoding"):
            decoded = tokenizer.decode(predicted, config.tiling)
        batches_timed, clips_timed = batches_timed + 1, clips_timed + len(keys)
        again = tokenizer.decode(tokens, config.tiling)
        prediction, reconstruction = (to_clip(frames).cpu() for frames in (decoded, again))
        prediction[:, : config.given_frames] = clips[:, : config.given_frames]
        arrays = (clips, prediction, reconstruction, tokens.cpu(), batch["index"][real], keys)
        for name, array in zip(parts, arrays, strict=True):
            parts[name].append(np.asarray(array))
        done += len(keys) * ranks.size
        if progress:
            progress.update(min(clips_there, done), "continuing")
    write_part(run, ranks.rank, parts)
    if not batches_timed:
        return None
    speed = Speed(
        clips=clips_timed,
        predicted_frames=clips_timed * (data.clip.frames - config.given_frames),
        batches=batches_timed,
        batch_size=config.batch_size,
        forward_steps=forward_steps(prior, given.shape[1]),
        sampling_s=watch.seconds["sampling"],
        whole_s=sum(watch.seconds.values()),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
    )
    log.info("%s", speed.in_words())
    return speed


def _write_pictures(run: Run, keys: list[str]) -> None:
    clips = {name: np.load(run.samples / f"{name}.npy", mmap_mode="r") for name in ARRAYS[:3]}
    write_side_by_side(run.samples, keys, clips)
    log.info("%d pictures in %s", len(keys), run.samples)
