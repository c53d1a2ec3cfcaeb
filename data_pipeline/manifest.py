"""What a shard set holds: manifest.json, and NAME.json beside every NAME.tar. Torch-free.

A shard set is a folder of tars. A *window* is a run of bytes of one tar that holds whole samples: the unit that is
read at once and shuffled. Merging folds the NAME.json of every shard into manifest.json, always to the same bytes.
"""

import hashlib
import json
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.config import ClipConfig, Location
from data_pipeline.disk import renamed
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import child, read_text

FORMAT = 2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(NamedTuple):
    """``bytes`` bytes at ``offset`` of a tar, which hold ``count`` samples."""

    offset: int
    bytes: int
    count: int


class Shard(_Record):
    """One tar: ``name``.tar, of ``bytes`` bytes. Its windows follow each other from its beginning; their sizes stand
    in columns, so that a manifest of a million windows is read in a fraction of a second."""

    name: str
    samples: int
    bytes: int
    sha256: str
    window_bytes: list[int]
    window_samples: list[int]

    @property
    def windows(self) -> list[Window]:
        offsets = accumulate(self.window_bytes, initial=0)
        return [Window(*window) for window in zip(offsets, self.window_bytes, self.window_samples, strict=False)]


class Moments(_Record):
    """Of the values of each channel, over ``count`` values: mean, and sum of squared distances from it."""

    count: int
    mean: list[float]
    m2: list[float]

    def __add__(self, other: "Moments") -> "Moments":
        """Of both together (Chan, Golub & LeVeque 1983, equation 2.1)."""
        count = self.count + other.count
        pairs = list(zip(self.mean, other.mean, strict=True))
        return Moments(
            count=count,
            mean=[a + (b - a) * other.count / count for a, b in pairs],
            m2=[
                p + q + (b - a) ** 2 * self.count * other.count / count
                for p, q, (a, b) in zip(self.m2, other.m2, pairs, strict=True)
            ],
        )


class Description(_Record):
    """What all shards of a set have in common. ``plan`` is a hash of all that the set was asked to hold and of how it
    was dealt, the same in whichever job wrote a shard: shards of other sets are told by it.

    kind clips: samples are encoded videos, or arrays (t, h, w, c) of type ``dtype`` whose channels have names and
    units, and whose rows, of fields on such a grid, lie at ``latitudes`` in degrees north; latents: samples are token
    ids of shape ``grid`` (T', H', W'), below ``codebook_size``, or floats of ``latent_channels`` channels
    (C, T', H', W'), made by the tokenizer whose hash is ``fingerprint`` from clips cut by ``clip``; ``dtype`` bfloat16
    stands in the files as its bits, in uint16.
    """

    kind: Literal["clips", "latents"]
    plan: str = ""
    classes: list[str] = []
    dtype: Literal["uint8", "uint16", "uint32", "float32", "bfloat16"] = "uint8"
    channels: list[str] = []
    units: list[str] = []
    latitudes: list[float] | None = Field(None, exclude_if=lambda value: value is None)
    fingerprint: str | None = None
    grid: tuple[int, int, int] | None = None
    codebook_size: int | None = None
    latent_channels: int | None = None
    clip: ClipConfig | None = None


class ShardRecord(_Record):
    """Contents of NAME.json: the shard, the set it is part of, and a hash of what it was asked to hold."""

    shard: Shard
    set: Description
    shards: int  # of the whole set
    plan: str
    skipped: dict[str, str] = {}  # samples left out because they could not be read: key → reason
    moments: Moments | None = None  # of arrays that are physical fields


class Manifest(Description):
    """Contents of manifest.json. ``shards`` are in the order of their names; shards without samples are left out."""

    format: Literal[2] = FORMAT
    samples: int
    moments: Moments | None = None
    skipped: int = 0  # left out because they could not be read
    shards: list[Shard]


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def _number(path: Path) -> int | None:
    """The index of the shard that ``path`` is a file of, finished or not; None of anything else."""
    match = re.match(r"\.?shard-(\d+)\.", path.name)
    return int(match[1]) if match else None


def find_manifest(location: Location | Path) -> Manifest | None:
    """The manifest of the shard set at ``location``, if there is one. UsageError if it is of another format."""
    path = child(location, "manifest.json")
    try:
        return Manifest.model_validate_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",):
            raise UsageError(
                f"{path}: is of format {first['input']}, this version reads {FORMAT}; make it again (shard, encode)"
            ) from None
        raise UsageError(f"{path}: not a manifest of format {FORMAT}: {first['msg']}") from None


def read_manifest(location: Location | Path) -> Manifest:
    """The manifest of a shard set. UsageError where there is none or it is of another format."""
    manifest = find_manifest(location)
    if manifest is None:
        raise UsageError(
            f"{location}: no shard set here: there is no manifest.json in it; `stpredict shard` and `encode` make "
            "them, and `stpredict merge` where several jobs wrote one"
        )
    return manifest


def read_record(folder: Path, index: int) -> ShardRecord | None:
    """NAME.json of one shard, or None where the shard is not finished."""
    path = folder / f"{shard_name(index)}.json"
    try:
        record = ShardRecord.model_validate_json(path.read_bytes())
        finished = path.with_suffix(".tar").stat().st_size == record.shard.bytes
    except (FileNotFoundError, ValidationError):
        return None
    return record if finished else None


def clear(folder: Path, indices: list[int], shards: int) -> None:
    """Makes room for the shards numbered ``indices`` of a set of ``shards``: removes the manifest and what earlier or
    killed runs left of them. Processes clear only their own shards, so that none removes another's work."""
    (folder / "manifest.json").unlink(missing_ok=True)
    mine = set(indices)
    for path in [*folder.glob("shard-*"), *folder.glob(".shard-*.tmp")]:
        number = _number(path)
        if number is not None and (number in mine or (number >= shards and 0 in mine)):
            path.unlink(missing_ok=True)


def merge(folder: str | Path) -> Manifest:
    """Folds the NAME.json of every shard into manifest.json. Raises what ``fold`` raises."""
    manifest = fold(Path(folder))
    write_manifest(Path(folder), manifest)
    return manifest


def fold(folder: Path, parts: int = 1) -> Manifest:
    """The manifest that the shards in ``folder``, written by ``parts`` jobs, have together.

    UserError if shards are missing, unfinished or of another set (it names them, and the jobs that write them), or no
    sample could be read."""
    numbers = (_number(path) for path in folder.glob("shard-*.json"))
    indices = sorted(number for number in numbers if number is not None)
    found = {index: read_record(folder, index) for index in indices}
    records = {index: record for index, record in found.items() if record is not None}
    if not records:
        who = f"part 0 of {parts}" if parts > 1 else "the job that writes them"
        raise UserError(f"{folder}: no finished shard there; run {who} again")
    sets = {index: (record.shards, record.set.model_dump_json()) for index, record in records.items()}
    ((count, description), _), *others = Counter(sets.values()).most_common()
    missing = [index for index in range(count) if index not in records]
    strange = [index for index, other in sets.items() if other != (count, description)] if others else []
    if missing or strange:
        problems = [f"missing or unfinished: {_some(missing)}"] * bool(missing)
        problems += [f"of another set: {_some(strange)}"] * bool(strange)
        writers = sorted({index % parts for index in missing + strange})
        who = f"part {', '.join(map(str, writers))} of {parts}" if parts > 1 else "the job that writes them"
        raise UserError(f"{folder}: of {count} shards {'; '.join(problems)}; run {who} again")
    shards = [records[index].shard for index in range(count) if records[index].shard.samples]
    skipped = sum(len(record.skipped) for record in records.values())
    if not shards:
        raise UserError(
            f"{folder}: none of the {skipped} samples could be read; `skipped` in shard-*.json gives each's reason. "
            "Add readable ones, or say which are whose by folders named train and val"
        )
    moments = [records[index].moments for index in range(count) if records[index].moments is not None]
    return Manifest(
        **dict(records[0].set),
        samples=sum(shard.samples for shard in shards),
        skipped=skipped,
        moments=sum(moments[1:], moments[0]) if moments else None,
        shards=shards,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, a line per shard: readable, and a tenth of the bytes of a line per number."""
    about = manifest.model_dump(mode="json", exclude_none=True, exclude={"shards"})
    shards = [json.dumps(shard.model_dump(mode="json"), sort_keys=True) for shard in manifest.shards]
    for left in folder.glob(".manifest.json.*.tmp"):  # by a merge that was killed
        left.unlink(missing_ok=True)
    head = json.dumps(about, indent=1, sort_keys=True).removesuffix("\n}")
    with renamed(folder / "manifest.json") as temporary:
        temporary.write_text(f'{head},\n "shards": [\n' + ",\n".join(shards) + "\n ]\n}\n")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_hash(*parts: Any) -> str:
    """A hash of what a shard is asked to hold; ``parts`` are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _some(indices: list[int]) -> str:
    names = [shard_name(index) for index in indices]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
