"""What ``stpredict inspect`` shows: the facts of a shard set, latent set, run, pipeline run, checkpoint or export."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.errors import UsageError
from data_pipeline.manifest import read_manifest, verify
from launcher.status import rows
from stpredict.run import Run

Facts = dict[str, Any]


def describe(path: Path) -> list[Facts]:
    """The facts of what ``path`` is and of the shard sets it holds. UsageError where it is none of ours."""
    if (path / "manifest.json").is_file():
        return [_set(path)]
    if path.name.startswith("step_") or (path / "COMPLETE").is_file():
        return [_checkpoint(path)]
    if (path / "model.safetensors").is_file():
        return [_export(path)]
    if (path / "pipeline.yaml").is_file():
        return [_pipeline(path)]
    own = [_run(Run(path))] if Run(path).status_path.is_file() else []
    if found := own + [_set(folder) for folder in _sets(path)]:
        return found
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    raise UsageError(
        f"{path}: not a shard set (manifest.json), run (status.json), pipeline run (pipeline.yaml), "
        "checkpoint (state.json) or export (model.safetensors)"
    )


def inspect(path: Path, picture: Path | None, check: bool, as_json: bool) -> int:
    """Prints the facts; exit status 1 if ``check`` finds a shard that is not what the manifest says."""
    found = describe(path)
    sets = [Path(facts["path"]) for facts in found if facts["what"] in ("shard set", "latent set")]
    if (picture or check) and not sets:
        raise UsageError(f"{path}: {'--picture' if picture else '--verify'} needs a shard set")
    problems = [f"{folder}: {problem}" for folder in sets for problem in _verify(folder)] if check else []
    if as_json:
        print(json.dumps({"found": found, "problems": problems} if check else {"found": found}, indent=1))
    else:
        for facts in found:
            print(f"{facts['what']}: {facts['path']}", flush=True)
            Console().print(_table(facts))
        for problem in problems:
            print(problem, file=sys.stderr)
        if check and not problems:
            print("all shards are as their manifest says")
    if picture:
        from data_pipeline.contact_sheet import contact_sheet

        contact_sheet(sets[0]).save(picture)
        print(picture, file=sys.stderr if as_json else sys.stdout)
    return 1 if problems else 0


def _sets(path: Path) -> list[Path]:
    return [folder for folder in (path / "train", path / "val") if (folder / "manifest.json").is_file()]


def _set(folder: Path) -> Facts:
    manifest = read_manifest(folder)
    sizes = [shard.bytes for shard in manifest.shards]
    counts = [shard.samples for shard in manifest.shards]
    facts = {
        "what": "latent set" if manifest.kind == "latents" else "shard set",
        "path": str(folder),
        "samples": manifest.samples,
        "skipped": manifest.skipped if manifest.kind == "clips" else None,
        "shards": len(manifest.shards),
        "samples per shard": f"{min(counts, default=0)} to {max(counts, default=0)}",
        "bytes": sum(sizes),
        "classes": ", ".join(manifest.classes),
        "token grid": manifest.grid and " x ".join(map(str, manifest.grid)),
        "codebook": manifest.codebook_size,
        "clip": manifest.clip and json.dumps(manifest.clip.model_dump(mode="json")),
        "tokenizer": manifest.fingerprint,
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}


def _verify(folder: Path) -> list[str]:
    console = Console(stderr=True)
    bar = iter(track(range(len(read_manifest(folder).shards)), f"reading {folder}", console=console))
    problems = verify(folder, lambda done, total: next(bar, None))
    next(bar, None)
    return problems


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
