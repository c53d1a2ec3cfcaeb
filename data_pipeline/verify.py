"""What is wrong with a shard set, shard by shard and sample by sample: `stpredict inspect --verify`. Torch-free.

Headers are read window by window, as the stream reads: damage in one window hides no other. (webdataset's own iteration
would drop the names and kinds of members that are looked for here.) Every sample is then decoded in a process of its
own, because a decoder may crash or hang, while a thread compares the hashes of the tars.
"""

import gzip
import itertools
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline import key_json
from data_pipeline.arrays import load_array, read_npy
from data_pipeline.decode import EXTENSIONS, probe
from data_pipeline.decoders import one_line
from data_pipeline.errors import DecodeError, UsageError
from data_pipeline.isolated import Failure, isolated
from data_pipeline.manifest import Description, Manifest, Shard, Window, file_sha256, read_manifest
from data_pipeline.storage import is_local, local_path

# KEY.EXTENSION, cut as webdataset does, at the first dot of the file's name.
_NAME = re.compile(r"(PART(?:/PART)*)\.([^/]+)".replace("PART", r"[^./\x00-\x1f\ud800-\udfff]+"))


class Problem(NamedTuple):
    """``key`` of the sample, where it is one sample's; ``shard`` is the file's name."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def verify(
    folder: str | Path,
    *,
    workers: int = 1,
    timeout_s: float = 60,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Everything that is wrong with a set, in the order of its shards; empty if all is well.

    Asked is whether every shard is as large as the manifest says and has its sha256; whether its samples are as many,
    with their members, and keys of the kind that we write, none twice in the set; whether videos decode and arrays load
    without pickle, and are what KEY.json and the manifest say. ``progress`` gets the bytes done and in all.

    UsageError if ``folder`` holds no set, or is a URL.
    """
    if not is_local(folder):
        raise UsageError(f"{folder}: a set is verified where its shards are; copy it to this machine or run this there")
    folder, manifest = local_path(folder), read_manifest(folder)
    walk = _Walk(folder, manifest)
    samples, asked = itertools.tee(walk.samples())
    done, total = 0, sum(shard.bytes for shard in manifest.shards)
    hasher = ThreadPoolExecutor(1)
    try:
        hashed = hasher.map(_changed, itertools.repeat(folder), manifest.shards)
        outcomes = isolated(_examine, samples, workers=workers, timeout_s=timeout_s)
        for outcome, sample in zip(outcomes, asked, strict=False):
            if isinstance(outcome, Failure):
                outcome = _Outcome([outcome.reason], [])
            walk.problems += (Problem(sample.shard, sample.key, reason) for reason in outcome.reasons)
            for clip in outcome.clips:
                walk.note(clip, sample.shard)
            done += sum(size for _, size in sample.members.values())
            if progress:
                progress(done, total)
        problems = [*_inconsistencies(manifest), *itertools.chain.from_iterable(hashed), *walk.problems]
    finally:
        hasher.shutdown(cancel_futures=True)
    if progress:
        progress(total, total)
    return sorted(problems, key=lambda problem: problem.shard)


class _Sample(NamedTuple):
    """A sample of a tar: offset and size of its members, by extension. ``clips``: how many a latent member holds."""

    folder: Path
    shard: str
    key: str
    members: dict[str, tuple[int, int]]
    clips: int


class _Outcome(NamedTuple):
    """What is wrong with a sample, and the keys of the clips in a latent member."""

    reasons: list[str]
    clips: list[str]


def _inconsistencies(manifest: Manifest) -> list[Problem]:
    """What the manifest alone tells."""
    problems = []
    if manifest.samples != sum(shard.samples for shard in manifest.shards):
        problems.append(Problem("manifest.json", None, f"says {manifest.samples} samples, its shards say otherwise"))
    for shard in manifest.shards:
        if shard.samples != sum(shard.window_samples) or shard.bytes < sum(shard.window_bytes):
            problems.append(Problem("manifest.json", shard.name, "its windows are not what the shard is said to hold"))
    return problems


def _changed(folder: Path, shard: Shard) -> list[Problem]:
    """What the file as a whole tells."""
    path = folder / f"{shard.name}.tar"
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return [Problem(path.name, None, f"{size} bytes, {shard.bytes} expected")]
        if file_sha256(path) != shard.sha256:
            return [Problem(path.name, None, "sha256 differs from the manifest's")]
    except FileNotFoundError:
        return [Problem(path.name, None, "missing")]
    except OSError as error:
        return [Problem(path.name, None, f"cannot be read: {error.strerror}")]
    return []


class _Walk:
    """Goes through the headers of all tars; ``problems`` grows meanwhile."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.problems: list[Problem] = []
        self._folder, self._manifest = folder, manifest
        self._payload = ("npy",) if manifest.kind == "latents" else (*EXTENSIONS, "npy")
        self._about = "json.gz" if manifest.kind == "latents" else "json"
        self._shards: dict[str, str] = {}  # of every key

    def samples(self) -> Iterator[_Sample]:
        """The samples that have all members."""
        for shard in self._manifest.shards:
            name = f"{shard.name}.tar"
            try:
                with (self._folder / name).open("rb") as file:
                    for window in shard.windows:
                        yield from self._window(file, name, window)
            except OSError:
                continue  # what _changed says

    def note(self, key: str, shard: str) -> None:
        """A key, which must be the first of its name."""
        if key in self._shards:
            self._complain(shard, key, f"is there twice: in {self._shards[key]} too")
        self._shards[key] = shard

    def _window(self, file: BinaryIO, shard: str, window: Window) -> Iterator[_Sample]:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            for member in _members(file, window):
                self._take(shard, member, samples)
        except (tarfile.TarError, ValueError, EOFError) as error:
            self._complain(shard, None, str(error))
        for key, members in samples.items():
            self.note(key, shard)
            payload = [extension for extension in self._payload if extension in members]
            if self._about not in members or len(payload) != 1:
                wanted = f".{self._about} and one of .{' .'.join(self._payload)}"
                self._complain(shard, key, f"has .{' .'.join(members)}; a sample has {wanted}")
            else:
                clips = window.count if self._manifest.kind == "latents" else 1
                yield _Sample(self._folder, shard, key, {e: members[e] for e in (*payload, self._about)}, clips)
        count = 1 if self._manifest.kind == "latents" else window.count
        if len(samples) != count:
            where = f"bytes {window.offset} to {window.offset + window.bytes}"
            self._complain(shard, None, f"{where} hold {len(samples)} samples, {count} expected")

    def _take(self, shard: str, member: tarfile.TarInfo, samples: dict[str, dict[str, tuple[int, int]]]) -> None:
        """Puts a member where it belongs."""
        name = _NAME.fullmatch(member.name)
        if name is None:
            self._complain(shard, member.name, "not the name of a member: KEY.EXTENSION, without dots or .. in KEY")
        elif not member.isreg():
            self._complain(shard, member.name, "a link, folder or device, not a file")
        elif name[2] in samples.setdefault(name[1], {}):
            self._complain(shard, name[1], f".{name[2]} is there twice")
        else:
            samples[name[1]][name[2]] = (member.offset_data, member.size)

    def _complain(self, shard: str, key: str | None, reason: str) -> None:
        self.problems.append(Problem(shard, key and ascii(key)[1:-1], reason))  # a name may hold control characters


def _members(file: BinaryIO, window: Window) -> Iterator[tarfile.TarInfo]:
    """The members in a window of a tar. TarError, or what tarfile raises on strange headers, where it is damaged."""
    file.seek(window.offset)
    end = window.offset + window.bytes
    at = window.offset
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while at < end:
                if (member := tar.next()) is None:
                    raise tarfile.ReadError("no header there")
                at = tar.offset
                yield member
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise tarfile.ReadError(f"damaged from byte {at} on: {error}") from None


def _examine(sample: _Sample) -> _Outcome:
    """Decodes a sample, in a process of its own."""
    description = _description(sample.folder)
    try:
        with (sample.folder / sample.shard).open("rb") as file:
            members = {extension: _read(file, *where) for extension, where in sample.members.items()}
        if description.kind == "latents":
            return _latents(members, description, sample.clips)
        return _Outcome(_clip(members, description), [])
    except Exception as error:  # decoders raise what they like on broken input
        return _Outcome([one_line(error)], [])


@cache
def _description(folder: Path) -> Manifest:
    return read_manifest(folder)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise DecodeError(f"cut off: {len(data)} of {size} bytes are there")
    return data


def _clip(members: dict[str, bytes], description: Description) -> list[str]:
    about = key_json.parse(members.pop("json"))
    ((extension, data),) = members.items()
    if extension == "npy":
        array = load_array(data)
        found = {"frames": array.shape[0], "height": array.shape[1], "width": array.shape[2], "dtype": str(array.dtype)}
        said = {**about, "dtype": description.dtype}
        if description.channels:
            found["channels"], said["channels"] = array.shape[3], len(description.channels)
    else:
        info = probe(data)
        found, said = {"frames": info.frames, "height": info.height, "width": info.width}, about
    problems = [
        f"{what} {value}, {said.get(what)} expected" for what, value in found.items() if value != said.get(what)
    ]
    if about.get("class") not in range(-1, len(description.classes)):
        problems.append(f"class {about.get('class')}, the set has {len(description.classes)}")
    return problems


def _latents(members: dict[str, bytes], description: Description, clips: int) -> _Outcome:
    about = key_json.parse(gzip.decompress(members["json.gz"]))
    latents = read_npy(members["npy"])
    keys, labels, size = [str(key) for key in about["keys"]], about["labels"], description.codebook_size
    problems = []
    if not len(keys) == len(labels) == len(latents) == clips:
        problems.append(f"{len(keys)} keys, {len(labels)} labels, {len(latents)} latents; {clips} clips expected")
    shape = description.grid if size else (description.latent_channels, *description.grid)
    dtype = description.dtype if size else "uint16"  # the bits of bfloat16
    if (latents.shape[1:], latents.dtype) != (shape, dtype):
        problems.append(f"{latents.dtype} of shape {latents.shape[1:]}, {dtype} of shape {shape} expected")
    elif size and latents.size and not latents.max() < size:
        problems.append(f"id {latents.max()}, codebook size {size}")
    if strange := [label for label in labels if label not in range(-1, len(description.classes))]:
        problems.append(f"class {strange[0]}, the set has {len(description.classes)}")
    return _Outcome(problems, keys)
