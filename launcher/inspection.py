"""What ``stpredict inspect`` shows: the facts of a shard set, latent set, run, pipeline run, checkpoint or export."""

import json
import os
import sys
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest, find_manifest
from data_pipeline.storage import child, expand, is_local
from launcher.parts import SPLITS, part_runs
from launcher.status import rows
from stpredict.run import Run

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
        raise UsageError(f"{location}: no shard set there: neither it nor train/ or val/ in it has a manifest.json")
    path = Path(location)
    if path.name.startswith("step_") or (path / "COMPLETE").is_file():
        return [_checkpoint(path)]
    if (path / "model.safetensors").is_file():
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
    """Prints the facts; exit status 1 if ``check`` finds a shard that is not what the manifest says."""
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"{picture}: give the picture a name that ends in {' or '.join(PICTURES)}")
    found = describe(location)
    sets = [facts["path"] for facts in found if facts["what"] in ("shard set", "latent set")]
    if (picture or check) and not sets:
        raise UsageError(f"{location}: {'--picture' if picture else '--verify'} needs a shard set")
    if (picture or check) and not is_local(sets[0]):
        raise UsageError(f"{sets[0]}: {'--picture' if picture else '--verify'} needs a shard set on this machine")
    problems = [problem for folder in sets for problem in _verify(folder, workers)] if check else []
    if as_json:
        print(json.dumps({"found": found, "problems": problems} if check else {"found": found}, indent=1))
    else:
        for facts in found:
            print(f"{facts['what']}: {facts['path']}", flush=True)
            Console().print(_table(facts))
        for problem in problems:
            print(": ".join(filter(None, problem.values())), file=sys.stderr)
        if check and not problems:
            print("all shards and samples are as their manifest says")
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

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"verifying {location}", total=None)
        problems = verify(
            location,
            workers=workers or len(os.sched_getaffinity(0)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return [{"set": location, **problem._asdict()} for problem in problems]


def _checkpoint(folder: Path) -> Facts:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        state = {}
    keys = ("step", "samples_consumed", "world_size", "zero_stage", "precision")
    return {
        "what": "checkpoint",
        "path": str(folder),
        "complete": (folder / "COMPLETE").is_file(),
        **{key: state[key] for key in keys if key in state},
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _export(folder: Path) -> Facts:
    from math import prod

    from safetensors import safe_open

    config = yaml.safe_load((folder / "config.yaml").read_text())
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a mapping)
        sizes = [prod(part.get_shape()) for part in slices]
        types = sorted({part.get_dtype() for part in slices})
    return {
        "what": f"export of a {config.get('kind', 'model')}",
        "path": str(folder),
        "step": config.get("step"),
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "types": ", ".join(types),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "model": json.dumps(config.get("model")),
    }


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
        "checkpoints": ", ".join(sorted(marker.parent.name for marker in run.checkpoints.glob("step_*/COMPLETE"))),
        "export": str(run.export) if run.export.is_dir() else None,
    }
    last = {row.get("split", "train"): row for row in run.metrics()}
    metrics = {f"last {split}": _values(row) for split, row in last.items()}
    return {key: value for key, value in (facts | metrics).items() if value not in (None, "")}


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
        if key not in ("what", "path"):
            table.add_row(key.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    return table
