"""A shard set that is to be read: its manifest, and where each of its shards lies. Torch-free."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_pipeline.config import Location
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description, Manifest, find_manifest, read_manifest
from data_pipeline.storage import child, expand, is_local, local_path


@dataclass(frozen=True)
class ShardSet:
    """``folders[i]`` holds shard number i of ``manifest``."""

    where: str
    manifest: Manifest
    folders: list[str]


def read_set(location: Location | Path, split: str) -> ShardSet:
    """The set ``split`` of a run, or of several runs that braces name: their shards one after another.

    UsageError where there is no set, or the runs hold different things.
    """
    where = child(location, split)
    runs = tuple(expand(where))
    if split == "test":  # the others are written of every source
        for run, folder in zip(expand(location), runs, strict=True):
            if find_manifest(folder) is None:
                raise UsageError(
                    f"{folder}: no shard set here: {run} has no test split; shard it with a source that has one, such "
                    "as by source.test (docs/data.md)"
                )
    return _read(where, runs, tuple(_stamp(child(run, "manifest.json")) for run in runs))


def _stamp(manifest: str) -> tuple[int, int] | None:
    """Changes when a local file does; one at a URL is taken to stay as it is while this process lives."""
    try:
        status = local_path(manifest).stat() if is_local(manifest) else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)  # every validation asks for its set again, and the manifest of a large one takes a while
def _read(where: str, runs: tuple[str, ...], _stamps: tuple[tuple[int, int] | None, ...]) -> ShardSet:
    manifests = [read_manifest(folder) for folder in runs]
    first = manifests[0]
    for folder, manifest in zip(runs, manifests, strict=True):
        for name in Description.model_fields.keys() - {"plan"}:
            if getattr(manifest, name) != getattr(first, name):
                raise UsageError(f"{folder}: its {name} is not that of {runs[0]}: they cannot be read as one set")
    moments = [manifest.moments for manifest in manifests if manifest.moments is not None]
    whole = first.model_copy(
        update={
            "samples": sum(manifest.samples for manifest in manifests),
            "skipped": sum(manifest.skipped for manifest in manifests),
            "moments": sum(moments[1:], moments[0]) if moments else None,
            "shards": [shard for manifest in manifests for shard in manifest.shards],
        }
    )
    folders = [folder for folder, manifest in zip(runs, manifests, strict=True) for _ in manifest.shards]
    return ShardSet(where, whole, folders)
