"""Continues held-out videos: first frames given, the rest predicted; .mp4 and .gif beside the truth."""

import hashlib
import json
import logging

import numpy as np
from data_pipeline.stream import clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video

from data_pipeline.errors import UsageError
from data_pipeline.video_files import write_gif, write_mp4
from stpredict.evaluation.pictures import side_by_side
from stpredict.exports import load_prior, load_tokenizer
from stpredict.jobs.config import GenerateConfig
from stpredict.run import Progress, Run, write_atomically
from stpredict.sampling.next_block import continue_tokens
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)
FPS = 8
ARRAYS = ("truth", "prediction", "reconstruction", "truth_tokens")


def run(config: GenerateConfig, run: Run) -> None:
    ranks = join_ranks()
    tokenizer, _, fingerprint = load_tokenizer(config.tokenizer)
    prior, prior_export = load_prior(config.prior)
    if prior_export.tokenizer_fingerprint != fingerprint:
        raise UsageError(
            f"{config.prior}: trained on latents of another tokenizer ({prior_export.tokenizer_fingerprint[:12]}) "
            f"than {config.tokenizer} ({fingerprint[:12]}); give the one it was trained with"
        )
    clip = config.data.clip
    grid = tokenizer.config.grid(clip.frames, *clip.size)
    if grid != prior_export.grid:
        raise UsageError(f"data.clip: gives a token grid {grid}, the prior was trained on {prior_export.grid}")
    given_grid = tokenizer.config.grid(config.given_frames, *clip.size)
    tokenizer.to(ranks.device), prior.to(ranks.device)
    progress = Progress(run, config.clips, "clip") if ranks.is_main else None
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*ARRAYS, "index")}
    keys: list[str] = []
    batches = clip_evaluation_batches(
        config.data,
        "val",
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        batch_size=config.batch_size,
        limit=config.clips,
    )
    for batch in batches:
        real = batch["weight"] > 0
        clips, batch_keys = batch["clip"][real], [key for key, keep in zip(batch["key"], real, strict=True) if keep]
        if not batch_keys:
            continue
        video = to_video(clips.to(ranks.device))
        tokens = tokenizer.encode(video)
        given = tokenizer.encode(video[:, :, : config.given_frames])
        assert given.shape[1:] == given_grid
        predicted = continue_tokens(prior, given, config.sampling, [_seed(config.seed, key) for key in batch_keys])
        prediction = to_clip(tokenizer.decode(predicted)).cpu()
        prediction[:, : config.given_frames] = clips[:, : config.given_frames]
        reconstruction = to_clip(tokenizer.decode(tokens)).cpu()
        arrays = (clips, prediction, reconstruction, tokens.cpu(), batch["index"][real])
        for name, array in zip(parts, arrays, strict=True):
            parts[name].append(array.numpy())
        keys += batch_keys
        if progress:
            progress.update(min(config.clips, len(keys) * ranks.size), "continuing")
    _write_part(run, ranks, parts, keys)
    ranks.barrier()
    if ranks.is_main:
        keys = _merge_parts(run, ranks)
        facts = {
            "keys": keys,
            "given_frames": config.given_frames,
            "fps": FPS,
            "codebook_size": prior_export.codebook_size,
            "prior_step": prior_export.step,
        }
        write_atomically(run.samples / "index.json", json.dumps(facts, indent=1) + "\n")
        _write_pictures(run, keys[: config.pictures])


def _seed(seed: int, key: str) -> int:
    """A sample's own seed, so that its video does not depend on the batch or the rank that it fell into."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def _write_part(run: Run, ranks: Ranks, parts: dict[str, list[np.ndarray]], keys: list[str]) -> None:
    run.samples.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    np.savez(run.samples / f"part_{ranks.rank}.npz", keys=np.array(keys, dtype=str), **arrays)


def _merge_parts(run: Run, ranks: Ranks) -> list[str]:
    """Puts the ranks' clips in the order of the shard set; returns their keys."""
    paths = [run.samples / f"part_{rank}.npz" for rank in range(ranks.size)]
    parts = [part for part in map(np.load, paths) if len(part["keys"])]
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
