"""Weights as safetensors, laid out as Hugging Face does, so that other tools read them. Torch-free to import.

model.safetensors                   all of them, where they fit, or else
model-00001-of-00003.safetensors    so many files, and
model.safetensors.index.json        which tensor is in which
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_pipeline.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
_NAMES = re.compile(rf"{re.escape(WHOLE)}|{re.escape(INDEX)}|model-\d{{5,}}-of-\d{{5,}}\.safetensors")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name belongs to the layout."""
    return bool(_NAMES.fullmatch(name))


def has_weights(folder: Path) -> bool:
    return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def split(sizes: Mapping[str, int], max_file_bytes: int) -> dict[str, list[str]]:
    """File → names of its tensors, in the order of ``sizes`` (name → bytes). Only a tensor that is larger by itself
    makes a file larger than ``max_file_bytes``."""
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def index_text(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
    """Contents of the index of several files."""
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


class WeightFiles:
    """The tensors in ``folder``, by name; only what is asked for is read. UserError where a file is damaged or missing,
    or has other tensors than the index says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths, listed = self._paths()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._path_of: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for path in self.paths:
            try:
                with safe_open(path, framework="numpy") as file:  # headers alone: torch is not imported for them
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        tensor = file.get_slice(name)
                        self.shapes[name], self.types[name] = tuple(tensor.get_shape()), tensor.get_dtype()
                        self._path_of[name] = path
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from error
        if listed is not None and (wrong := listed ^ self.shapes.keys()):
            where = "is listed and in none of the files" if min(wrong) in listed else "is in a file and not listed"
            raise UserError(f"{folder / INDEX}: {min(wrong)} {where}; export it again")

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def fill(self, name: str, start: int, out) -> None:
        """Sets ``out``, a 1-D tensor, to elements ``start`` and following of the flattened tensor ``name``."""
        path = self._path_of[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        whole = self._open[path].get_tensor(name)  # mapped from the file: only what is copied is read
        out.copy_(whole.reshape(-1)[start : start + out.numel()])

    def _paths(self) -> tuple[list[Path], set[str] | None]:
        """The files, in order, and the names that the index lists, where there is one."""
        if (self.folder / WHOLE).is_file():
            return [self.folder / WHOLE], None
        path = self.folder / INDEX
        try:
            files = dict(json.loads(path.read_text())["weight_map"])
            return [self.folder / name for name in sorted(set(files.values()))], set(files)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"{path}: damaged, or missing ({reason}); export it again")
