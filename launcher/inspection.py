"""What ``stpredict inspect`` shows: the facts of a shard set, latent set, run, pipeline run, checkpoint or export."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from math import prod, sqrt
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.config import SPLITS
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import Manifest, find_manifest
from data_pipeline.storage import child, expand, is_local
from launcher.parts import part_runs
from launcher.progress import bytes_bar
from launcher.status import rows
from stpredict.config import differences, flat, load
from stpredict.jobs.config import AnyJobConfig
from stpredict.run import Run
from stpredict.training.checkpoint import (
    MARKER,
    CheckpointState,
    TensorEntry,
    all_checkpoints,
    bytes_of,
    is_checkpoint,
    read_index,
    read_marker,
    read_state,
    why_unusable,
    wrong_size,
)
from stpredict.weight_files import WeightFiles, has_weights

Facts = dict[str, Any]


def describe(location: str) -> list[Facts]:
    """The facts of what ``location`` is and of the shard sets it holds; braces name several, and sets may be at URLs.
    UsageError where it is none of ours."""
    if len(places := expand(location)) > 1:
        return [facts for place in places for facts in describe(place)]
    own = [_run(Run(location))] if is_local(location) and Run(location).status_path.is_file() else []
    if sets := _sets(location):
        return own + [_set(*found) for found in sets.items()]
    if not is_local(location):
        raise UsageError(
            f"{location}: no shard set there: it has no manifest.json, nor has train/, val/ or test/ in it"
        )
    path = Path(location)
    if is_checkpoint(path):
        return [_checkpoint(path)]
    if has_weights(path):
        return [_export(path)]
    if (path / "pipeline.yaml").is_file():
        return [_pipeline(path)]
    if own:
        return own
    if part_runs(path):
        raise UsageError(f"{path}: written by several parts and not merged yet: `stpredict merge {path}`")
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    raise UsageError(
        f"{path}: not a shard set (manifest.json), run (status.json), pipeline run (pipeline.yaml), "
        "checkpoint (state.json) or export (model.safetensors)"
    )


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def inspect(location: str, picture: Path | None, check: bool, workers: int | None, as_json: bool) -> int:
    """Prints the facts; exit status 1 if ``check`` finds a shard that is not what the manifest says, or a checkpoint
    that is not what was written."""
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"{picture}: give the picture a name that ends in {' or '.join(PICTURES)}")
    found = describe(location)
    sets = [facts["path"] for facts in found if facts["what"] in ("shard set", "latent set")]
    checkpoints = [folder for facts in found for folder in _to_verify(facts)]
    if picture and not sets:
        raise UsageError(f"{location}: --picture needs a shard set")
    if check and not sets and not checkpoints:
        raise UsageError(f"{location}: --verify needs a shard set or a checkpoint")
    if (picture or check) and sets and not is_local(sets[0]):
        raise UsageError(f"{sets[0]}: {'--picture' if picture else '--verify'} needs a shard set on this machine")
    problems = []
    if check:
        problems = [problem for folder in sets for problem in _verify(folder, workers)]
        problems += [problem for folder in checkpoints for problem in _verify_checkpoint(folder)]
    if as_json:
        print(json.dumps({"found": found, "problems": problems} if check else {"found": found}, indent=1))
    else:
        for facts in found:
            print(f"{facts['what']}: {facts['path']}", flush=True)
            Console().print(_table(facts))
        for problem in problems:
            print(": ".join(filter(None, problem.values())), file=sys.stderr)
        if check and not problems:
            checked = ["all shards and samples are as their manifest says"] if sets else []
            checked += ["all checkpoints are as they were written"] if checkpoints else []
            print("\n".join(checked))
    if picture:
        from data_pipeline.contact_sheet import contact_sheet

        contact_sheet(sets[0]).save(picture)
        print(picture, file=sys.stderr if as_json else sys.stdout)
    return 1 if problems else 0


def _sets(location: str) -> dict[str, Manifest]:
    """The shard sets that ``location`` is or holds."""
    places = [location, *(child(location, split) for split in SPLITS)]
    return {place: manifest for place in places if (manifest := find_manifest(place)) is not None}


def _set(location: str, manifest: Manifest) -> Facts:
    shards = manifest.shards
    facts = {
        "what": "latent set" if manifest.kind == "latents" else "shard set",
        "path": location,
        "samples": manifest.samples,
        "skipped": f"{manifest.skipped} (`skipped` in shard-*.json names them)" if manifest.skipped else None,
        "shards": len(shards),
        "samples per shard": _range(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "bytes per shard": _range(shard.bytes for shard in shards),
        "windows": sum(len(shard.window_bytes) for shard in shards),
        "bytes per window": _range(size for shard in shards for size in shard.window_bytes),
        "samples per window": _range(count for shard in shards for count in shard.window_samples),
        "classes": ", ".join(manifest.classes),
        "type of arrays": manifest.dtype if manifest.channels or manifest.moments else None,
        **_channels(manifest),
        "latitudes": (rows := manifest.latitudes) and f"{rows[0]:g} to {rows[-1]:g} degrees north",
        "token grid": manifest.grid and " x ".join(map(str, manifest.grid)),
        "codebook": manifest.codebook_size,
        "clip": manifest.clip and json.dumps(manifest.clip.model_dump(mode="json")),
        "tokenizer": manifest.fingerprint,
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}


def _channels(manifest: Manifest) -> Facts:
    """A line per channel of a physical field: its unit, mean and standard deviation."""
    moments = manifest.moments
    count = len(moments.mean) if moments else len(manifest.channels)
    facts = {}
    for index in range(count):
        name = manifest.channels[index] if manifest.channels else str(index)
        unit = manifest.units[index] if manifest.units else ""
        about = f"mean {moments.mean[index]:.5g}, std {sqrt(moments.m2[index] / moments.count):.5g}" if moments else ""
        facts[f"channel {name}"] = " ".join(filter(None, (about, unit))) or "no unit"
    return facts


def _range(values: Iterable[int]) -> str:
    """``12 to 14``, or one number where all are equal."""
    least, most = min(values := list(values), default=0), max(values, default=0)
    return f"{least:,} to {most:,}" if least != most else f"{most:,}"


def _verify(location: str, workers: int | None) -> list[dict[str, str | None]]:
    """The problems of a set, with a bar over the bytes read."""
    from data_pipeline.verify import verify

    with bytes_bar(f"verifying {location}") as progress:
        problems = verify(location, workers=workers or len(os.sched_getaffinity(0)), progress=progress)
    return [{"set": location, **problem._asdict()} for problem in problems]


def _to_verify(facts: Facts) -> list[Path]:
    """A checkpoint that was asked for, or those of a run that have been completed: one that is being saved is no
    damage."""
    if facts["what"] == "checkpoint":
        return [Path(facts["path"])]
    folders = [Run(facts["path"]).checkpoints / one["name"] for one in facts.get("checkpoints", [])]
    return [folder for folder in folders if (folder / MARKER).is_file()]


def _verify_checkpoint(folder: Path) -> list[dict[str, str | None]]:
    """Why a checkpoint cannot be used, with a bar over the bytes read."""
    with bytes_bar(f"verifying {folder.name}") as progress:
        problem = why_unusable(folder, progress)
    return [{"checkpoint": str(folder), "reason": problem}] if problem else []


def _checkpoint(folder: Path) -> Facts:
    """What can be said of a checkpoint without reading its tensors, of whatever is left of it."""
    problem = _why_incomplete(folder)
    facts: Facts = {}
    for read in (_state_facts, _index_facts):
        try:
            facts |= read(folder)
        except UserError as error:
            problem = problem or str(error)
    return {
        "what": "checkpoint",
        "path": str(folder),
        "complete": problem is None,
        **({"problem": problem} if problem else {}),
        "bytes": bytes_of(folder),
        "files": sum(path.is_file() for path in folder.iterdir()),
        **facts,
    }


def _why_incomplete(folder: Path) -> str | None:
    """What is missing of a checkpoint, by its marker and the sizes of its files."""
    files = read_marker(folder)
    if isinstance(files, str):
        return files
    return "; ".join(filter(None, (wrong_size(folder, *file) for file in files.items()))) or None


def _state_facts(folder: Path) -> Facts:
    state = read_state(folder)
    facts = {
        "step": state.step,
        "world_size": state.world_size,
        "zero_stage": state.zero_stage,
        "precision": state.precision,
        "samples_consumed": state.samples_consumed,
        "quarantined": len(state.quarantined),
        "optimizer_steps": {name: steps for name, steps in state.optimizer_steps.items() if "/" not in name},
        "metrics": state.metrics,
        "config": hashlib.sha256(repr(sorted(state.config.items())).encode()).hexdigest()[:12],
    }
    if changes := _changes(folder, state):
        facts["changed since"] = changes
    return facts


def _changes(folder: Path, state: CheckpointState) -> list[str]:
    """What the config of the run that a checkpoint lies in says otherwise: such a checkpoint is not continued."""
    run = Run(folder.absolute().parent.parent)
    try:
        config = load(AnyJobConfig, run.config_path)
    except UserError:
        return []  # it has been moved out of its run
    now = config.decisive(flat(config.model_dump(mode="json")))
    if now.get("training.precision") == "auto":
        now["training.precision"] = state.precision
    return differences(state.config, now)


def _index_facts(folder: Path) -> Facts:
    index = read_index(folder)
    modules = sorted({key.split("/")[0] for key in index})
    return {
        **{module: _module(index, module) for module in modules},
        "ema": any(key.split("/")[1] == "ema" for key in index),
    }


def _module(index: dict[str, TensorEntry], module: str) -> dict[str, int]:
    """Elements of a module's parameters, those that are trained and those that are not, and of its buffers."""
    kinds: dict[str, dict[str, int]] = {}
    for key, entry in index.items():
        owner, kind, name = key.split("/", 2)
        if owner == module:
            kinds.setdefault(kind, {})[name] = entry.elements
    weights = kinds.pop("weight", {})
    buffers = kinds.pop("buffer", {})
    kinds.pop("ema", None)
    moving = {name for names in kinds.values() for name in names}  # the optimizer keeps moments of them
    trained = sum(elements for name, elements in weights.items() if name in moving)
    return {"trained": trained, "frozen": sum(weights.values()) - trained, "in buffers": sum(buffers.values())}


def _export(folder: Path) -> Facts:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    weights = WeightFiles(folder)
    facts = {
        "what": f"export of a {config.get('kind', 'model')}",
        "path": str(folder),
        "step": config.get("step"),
        "ema": bool(config.get("ema")),
        "parameters": sum(prod(shape) for shape in weights.shapes.values()),
        "tensors": len(weights.shapes),
        "types": ", ".join(sorted(set(weights.types.values()))),
        "files": len(weights.paths),
        "bytes": weights.bytes,
        "model": json.dumps(config.get("model")),
    }
    return facts


def _run(run: Run) -> Facts:
    status = run.status()
    facts = {
        "what": f"run of kind {status.kind}",
        "path": str(run.path),
        "state": status.state,
        "step": f"{status.step} of {status.steps}" if status.steps else status.step,
        "started": status.started,
        "finished": status.finished,
        "error": status.error,
        "checkpoints": [_listed(folder) for folder in all_checkpoints(run.checkpoints)],
        "export": str(run.export) if run.export.is_dir() else None,
    }
    last = {row.get("split", "train"): row for row in run.metrics()}
    metrics = {f"last {split}": _values(row) for split, row in last.items()}
    return {key: value for key, value in (facts | metrics).items() if value not in (None, "", [])}


def _listed(folder: Path) -> Facts:
    problem = _why_incomplete(folder)
    about = {"name": folder.name, "complete": problem is None, "bytes": bytes_of(folder)}
    return about | ({"problem": problem} if problem else {})


def _pipeline(path: Path) -> Facts:
    name = yaml.safe_load((path / "pipeline.yaml").read_text())["name"]
    return {"what": f"run of pipeline {name}", "path": str(path)} | {row.job: row.state for row in rows(path)}


def _values(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.5g}" for key, value in row.items() if isinstance(value, int | float) and key != "time"
    )


def _table(facts: Facts) -> Table:
    table = Table(show_header=False, box=box.SIMPLE)
    for key, value in facts.items():
        if key == "checkpoints":
            for one in value:
                table.add_row(one["name"], f"{one['bytes']:,} bytes" + (f"; {p}" if (p := one.get("problem")) else ""))
        elif key not in ("what", "path"):
            table.add_row(key.replace("_", " "), _text(value))
    return table


def _text(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.5g}"
        case dict():
            return "\n".join(f"{key}: {_text(item)}" for key, item in value.items())
        case list():
            return "\n".join(map(_text, value))
    return str(value)
