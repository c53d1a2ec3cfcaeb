"""Makes videos from nothing but, where the prior is told one, their class: the part of generate without given frames.

samples/prediction.npy  the clips, uint8 (n, t, h, w, c); samples/index.json says the class of each by its key
samples/classes.gif, .mp4, .png  a row per class: the clips side by side, and frames of some of them
"""

import difflib
import json
import logging

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import UsageError
from data_pipeline.transforms import to_clip
from data_pipeline.video_files import write_gif, write_mp4
from stpredict.evaluation.generated import Speed
from stpredict.evaluation.pictures import FPS, class_grid, film_strip
from stpredict.exports import PriorExport
from stpredict.jobs.config import GenerateConfig
from stpredict.jobs.generated_parts import merge_parts, seed_of, write_part
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.prefixes import Prefixes
from stpredict.run import Progress, Run, write_atomically
from stpredict.sampling.next_block import continue_tokens, forward_steps, warm_up
from stpredict.sampling.recording import Recording
from stpredict.sampling.stopwatch import Stopwatch
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.training.ranks import Ranks

log = logging.getLogger(__name__)
COLUMNS = 8  # clips of a class in the pictures, at most


def class_numbers(config: GenerateConfig, export: PriorExport) -> list[int]:
    """Of each clip to make: its class's number, -1 without classes. Class after class, as evenly as may be.
    UsageError for classes that the prior does not know."""
    if not export.classes:
        if config.classes:
            raise UsageError(f"classes: {config.prior} is told no class; leave them out")
        return [-1] * config.clips
    numbers = []
    for name in config.classes or export.classes:
        if name not in export.classes:
            near = difflib.get_close_matches(name, export.classes, n=1, cutoff=0)
            raise UsageError(
                f"classes: {name!r} is none of the {len(export.classes)} that {config.prior} knows; "
                f"did you mean {near[0]!r}?"
            )
        numbers.append(export.classes.index(name))
    return sorted((numbers[clip % len(numbers)] for clip in range(config.clips)), key=numbers.index)


def make_samples(
    config: GenerateConfig,
    numbers: list[int],
    tokenizer: CausalCnnTokenizer,
    prior: NextBlockPrior,
    export: PriorExport,
    prefixes: Prefixes | None,
    run: Run,
    ranks: Ranks,
) -> None:
    """``numbers``: of each clip to make, its class's."""
    names = [export.classes[number] if number >= 0 else "sample" for number in numbers]
    counted = [f"{name}-{names[:clip].count(name)}" for clip, name in enumerate(names)]
    mine = list(range(ranks.rank, len(numbers), ranks.size))
    progress = Progress(run, len(numbers), "clip") if ranks.is_main else None
    parts: dict[str, list] = {"prediction": [], "tokens": [], "index": [], "keys": []}
    watch = Stopwatch(ranks.device)
    recording = Recording() if ranks.device.type == "cuda" else None  # of full batches; others are few
    for start in range(0, len(mine), config.batch_size):
        index = mine[start : start + config.batch_size]
        keys = [counted[clip] for clip in index]
        labels = torch.tensor([numbers[clip] for clip in index], device=ranks.device)
        nothing = torch.empty(len(keys), 0, *prior.order.grid[1:], dtype=torch.int64, device=ranks.device)
        told = (prefixes.of(labels), prefixes.of(torch.full_like(labels, -1))) if prefixes else ()
        wanted = prior, nothing, config.sampling, [seed_of(config.seed, key) for key in keys], *told
        recorded = recording if len(keys) == config.batch_size else None
        if not start:
            tokenizer.decode(warm_up(recorded, *wanted), config.tiling)
        with watch.timing("sampling"):
            tokens = continue_tokens(*wanted, recording=recorded)
        with watch.timing("decoding"):
            clips = to_clip(tokenizer.decode(tokens, config.tiling))
        for name, array in zip(parts, (clips.cpu(), tokens.cpu(), index, keys), strict=True):
            parts[name].append(np.asarray(array))
        if progress:
            progress.update(min(len(numbers), (start + len(index)) * ranks.size), "sampling")
    write_part(run, ranks.rank, parts)
    ranks.barrier()
    if not ranks.is_main:
        return
    speed = _speed(config, prior, watch, parts["prediction"], ranks)
    log.info("%s", speed.in_words())
    keys = merge_parts(run, ranks.size, ("prediction", "tokens"))
    facts = {
        "keys": keys,
        "classes": names,
        "given_frames": 0,
        "codebook_size": export.codebook_size,
        "prior_step": export.step,
        "speed": speed.model_dump(),
    }
    write_atomically(run.samples / "index.json", json.dumps(facts, indent=1) + "\n")
    _write_pictures(run, names)


def _speed(
    config: GenerateConfig, prior: NextBlockPrior, watch: Stopwatch, made: list[np.ndarray], ranks: Ranks
) -> Speed:
    clips = sum(map(len, made))
    return Speed(
        clips=clips,
        predicted_frames=clips * made[0].shape[1],
        batches=len(made),
        batch_size=config.batch_size,
        forward_steps=forward_steps(prior, 0),
        sampling_s=watch.seconds["sampling"],
        whole_s=sum(watch.seconds.values()),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
    )


def _write_pictures(run: Run, names: list[str]) -> None:
    clips = np.load(run.samples / "prediction.npy", mmap_mode="r")
    of_class = {name: [clips[i] for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    columns = min(COLUMNS, *map(len, of_class.values()))
    grid = class_grid({name: shown[:columns] for name, shown in of_class.items()})
    write_mp4(run.samples / "classes.mp4", grid, FPS)
    write_gif(run.samples / "classes.gif", grid, FPS)
    strips = {name: [film_strip(clip) for clip in shown[: min(2, columns)]] for name, shown in of_class.items()}
    Image.fromarray(class_grid(strips)[0]).save(run.samples / "classes.png")
    log.info("pictures of %d classes in %s", len(of_class), run.samples)
