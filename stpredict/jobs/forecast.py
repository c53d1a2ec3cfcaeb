"""What a forecaster makes of held-out clips: given, true and predicted frames as arrays, and pictures.

The arrays are written clip by clip, so that seventeen thousand windows need no memory. What they are is said in
evaluation/forecasts.py.
"""

import logging
import math
from datetime import UTC, datetime
from itertools import compress
from typing import Any

import numpy as np
import torch

from data_pipeline.arrays import centre_rows
from data_pipeline.config import ClipConfig, ClipDataConfig, StreamConfig
from data_pipeline.disk import check_space
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, find_manifest
from data_pipeline.order import Share
from data_pipeline.shard_set import read_set
from data_pipeline.storage import child, expand
from data_pipeline.stream import clip_evaluation_batches
from stpredict.config import validate
from stpredict.evaluation.forecast_pictures import write_forecast_pictures
from stpredict.evaluation.forecasts import ARRAYS, ForecastIndex
from stpredict.exports import ForecasterExport, load_forecaster
from stpredict.forecasters.config import AffineScaling, StandardScaling, UnitScaling
from stpredict.forecasters.scaling import Scaling, of_grey_levels, scaling_of
from stpredict.jobs.clip_arrays import ClipArray, keep_read
from stpredict.jobs.config import ForecastConfig
from stpredict.run import Progress, Run, write_atomically
from stpredict.sampling.stopwatch import Stopwatch
from stpredict.training.ranks import join_ranks

log = logging.getLogger(__name__)
SPLITS = ("test", "val")  # of which the first that is there is forecast


def run(config: ForecastConfig, run: Run) -> None:
    forecaster, export = assembled(config)
    split = config.data.split or _split(config)
    data = _clips(config, export)
    manifest = read_set(config.data.shards, split).manifest
    scaling = _scaling(config, export, manifest, split)
    model = forecaster.config
    count = manifest.samples * data.clip.per_video
    count = min(config.clips or count, count)
    frame = (*model.size, model.channels)
    stored = np.dtype(manifest.dtype)
    shapes = {"given": (model.input_frames, *frame)} | dict.fromkeys(ARRAYS[1:], (model.output_frames, *frame))
    types = {"given": stored, "truth": stored, "prediction": np.dtype(np.float32)}
    files = {name: ClipArray(run.samples / f"{name}.npy", count, shapes[name], types[name]) for name in ARRAYS}
    check_space(run.path, sum(file.bytes for file in files.values()))
    with join_ranks() as ranks:
        if ranks.is_main:
            run.samples.mkdir(parents=True, exist_ok=True)
            for file in files.values():
                file.create()
        ranks.barrier()
        forecaster.to(ranks.device)
        progress = Progress(run, count, "clip") if ranks.is_main else None
        watch, timed = Stopwatch(ranks.device), 0
        found: dict[int, tuple[str, list[int]]] = {}
        share = Share(ranks.rank, ranks.size, config.batch_size)
        batches = clip_evaluation_batches(data, split, seed=config.seed, share=share, samples=range(count))
        for number, batch in enumerate(batches):
            real = batch["weight"] > 0
            rows = batch["index"][real].tolist()
            if not rows:
                continue
            clips = batch["clip"][real].to(ranks.device)
            given = scaling.scaled(clips[:, : model.input_frames])
            with torch.no_grad(), watch.timing("forecasting" if number else "warming up"):
                predicted = forecaster(given).frames
            timed += len(rows) if number else 0
            values = (clips[:, : model.input_frames], clips[:, model.input_frames :], scaling.physical(predicted))
            for file, of_clips in zip(files.values(), values, strict=True):
                file.write(rows, of_clips.cpu().numpy())
            times = batch["minutes"][real].tolist() if "minutes" in batch else [[]] * len(rows)
            found |= dict(zip(rows, zip(compress(batch["key"], real), times, strict=True), strict=True))
            if progress:
                progress.update(min(count, len(found) * ranks.size), "forecasting")
        found = {row: of_row for part in ranks.gather(found) for row, of_row in part.items()}
        if ranks.is_main:
            seconds = watch.seconds["forecasting"] / timed if timed else None
            latitudes = manifest.latitudes and manifest.latitudes[centre_rows(len(manifest.latitudes), data.clip)]
            about = {"split": split, "seconds_per_sample": seconds, "latitudes": latitudes}
            arrays = {name: np.load(file.path, mmap_mode="r") for name, file in files.items()}
            _finish(config, run, arrays, dict(sorted(found.items())), export, manifest, scaling, model, about)
        ranks.barrier()


def assembled(config: ForecastConfig) -> tuple[torch.nn.Module, ForecasterExport]:
    """The forecaster, for the horizon that is asked for and with the parts that come from others. UsageError where
    those do not fit, or were trained on values that were scaled otherwise."""
    forecaster, export = load_forecaster(config.forecaster)
    for part, path in config.swap.items():
        if not hasattr(forecaster, part):
            raise UsageError(f"swap.{part}: {config.forecaster} is a {export.model.kind}, which has no {part}")
        other, of_other = load_forecaster(path)
        if (of_other.offset, of_other.scale) != (export.offset, export.scale):
            raise UsageError(
                f"swap.{part}: {path} sees other values than {config.forecaster}: offset {list(of_other.offset)} and "
                f"scale {list(of_other.scale)}, not {list(export.offset)} and {list(export.scale)}; take one that was "
                "trained on the same shards"
            )
        try:
            getattr(forecaster, part).load_state_dict(getattr(other, part).state_dict())
        except (AttributeError, RuntimeError):
            raise UsageError(f"swap.{part}: {path}: its {part} has other layers than {config.forecaster}") from None
    if config.output_frames:
        forecaster.config = forecaster.config.model_copy(update={"output_frames": config.output_frames})
    return forecaster, export


def _split(config: ForecastConfig) -> str:
    """The first of SPLITS that the shards have, be it damaged."""
    for split in SPLITS:
        if any(find_manifest(folder) for folder in expand(child(config.data.shards, split))):
            return split
    raise UsageError(f"{config.data.shards}: has no split {' or '.join(SPLITS)}; make the shards first")


def _clips(config: ForecastConfig, export: ForecasterExport) -> ClipDataConfig:
    """Those that the forecaster was trained on, with what ``config`` changes and the frames that it needs."""
    frames = export.model.input_frames + (config.output_frames or export.model.output_frames)
    changes = {"frames": frames} | config.data.clip.model_dump(exclude_none=True)
    clip = validate(ClipConfig, export.clip.model_dump() | changes, "data.clip")
    if (clip.frames, clip.size) != (frames, export.model.size):
        raise UsageError(
            f"data.clip: {clip.frames} frames of {clip.size[0]}x{clip.size[1]}; {config.forecaster} takes "
            f"{export.model.input_frames} and gives {frames - export.model.input_frames} of "
            f"{export.model.size[0]}x{export.model.size[1]}"
        )
    fields = {name: getattr(config.data, name) for name in StreamConfig.model_fields}
    return ClipDataConfig(**fields, shards=config.data.shards, clip=clip.unaugmented)


def _scaling(config: ForecastConfig, export: ForecasterExport, manifest: Manifest, split: str) -> Scaling:
    """That of the training, or the split's own where the training was asked for such. UsageError where the set holds
    other values, channels or, where both are known, units than the forecaster was trained on."""
    where, field = f"{config.data.shards}/{split}", manifest.dtype == "float32"
    if field == _saw_video(export) and not isinstance(export.scaling, AffineScaling):
        held, seen = ("a field", "video") if field else ("video", "a field")
        raise UsageError(f"{where}: holds {held} ({manifest.dtype}); {config.forecaster} was trained on {seen}")
    own = scaling_of(export.scaling, export.model.channels, where, manifest)
    if isinstance(export.scaling, StandardScaling) and export.scaling.statistics == "own":
        return own
    if export.channels and manifest.channels and export.channels != manifest.channels:
        raise UsageError(
            f"{config.data.shards}: holds {', '.join(manifest.channels)}; {config.forecaster} was trained on "
            f"{', '.join(export.channels)}"
        )
    for number, (held, seen) in enumerate(zip(manifest.units, export.units, strict=False)):
        if held and seen and held != seen:
            name = manifest.channels[number] if manifest.channels else f"channel {number}"
            raise UsageError(
                f"{where}: {name} is in {held}; {config.forecaster} was trained on it in {seen}; make shards in {seen}"
            )
    return Scaling(export.offset, export.scale)


def _saw_video(export: ForecasterExport) -> bool:
    """By its scaling or, where that was left to the data, by what came of it."""
    if export.scaling is not None:
        return isinstance(export.scaling, UnitScaling)
    grey = of_grey_levels(export.model.channels)
    return (export.offset, export.scale) == (grey.offset, grey.scale)


def _finish(
    config: ForecastConfig,
    run: Run,
    arrays: dict[str, np.ndarray],
    found: dict[int, tuple[str, list[int]]],
    export: ForecasterExport,
    manifest: Manifest,
    scaling: Scaling,
    model,
    about: dict[str, Any],
) -> None:
    keep_read(run.samples, arrays, list(found))
    keys, minutes = zip(*found.values(), strict=True)
    names = list(manifest.channels) or _channel_names(model.channels)
    index = ForecastIndex(
        keys=list(keys),
        data="frames" if manifest.dtype == "uint8" else "field",
        channels=names,
        units=list(manifest.units) or [""] * len(names),
        offset=list(scaling.offset),
        scale=list(scaling.scale),
        **_times(f"{config.data.shards}/{about['split']}", keys, minutes, model.input_frames),
        forecaster=_name(model),
        forecaster_step=export.step,
        input_frames=model.input_frames,
        output_frames=model.output_frames,
        **about,
    )
    write_atomically(run.samples / "index.json", index.model_dump_json(indent=1) + "\n")
    write_forecast_pictures(run.samples, index, *(arrays[name] for name in ARRAYS), config.pictures)
    log.info("%d clips and their forecasts in %s", len(keys), run.samples)


def _times(where: str, keys: tuple[str, ...], minutes: tuple[list[int], ...], input_frames: int) -> dict[str, Any]:
    """Of what each sample's frames show, as the index has it; nothing where it is not known. UsageError where the
    frames of one sample are otherwise apart than those of another: lead times are those of all."""
    first, *others = ([minute - of[0] for minute in of] for of in minutes)
    for key, apart in zip(keys[1:], others, strict=True):
        # Two are whole minutes' rounding.
        if len(apart) != len(first) or any(abs(one - other) > 2 for one, other in zip(apart, first, strict=True)):
            raise UsageError(
                f"{where}: the frames of {key} are at {_hours(apart)}, those of {keys[0]} at {_hours(first)}: lead "
                "times are those of all samples; make shards of samples whose frames are alike apart"
            )
    if not first:
        return {}
    seen = first[input_frames - 1] / 60
    leads = [(later - first[input_frames - 1]) / 60 for later in first[input_frames:]]
    times = [datetime.fromtimestamp(60 * of[input_frames], UTC).replace(tzinfo=None) for of in minutes]
    regular = all(math.isclose(lead, leads[0] * number) for number, lead in enumerate(leads, 1))
    seen_h = None if math.isclose(seen, leads[0] * (input_frames - 1)) else seen
    return {"times": times, "interval_h": leads[0], "seen_h": seen_h, "leads_h": None if regular else leads}


def _hours(minutes: list[int]) -> str:
    """In a message."""
    return f"{', '.join(f'{minute / 60:g}' for minute in minutes)} h" if minutes else "times that are not known"


def _name(model) -> str:
    """As papers call it: the translator, and the quantizer where there is one."""
    parts = [model.translator.kind if model.kind == "simvp" else model.kind]
    parts += [model.quantizer.kind] if getattr(model, "quantizer", None) else []
    return " + ".join(parts)


def _channel_names(channels: int) -> list[str]:
    return {1: ["grey"], 3: ["red", "green", "blue"]}.get(channels, [f"channel {n}" for n in range(channels)])
