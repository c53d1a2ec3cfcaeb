"""Where shard sets are: a folder, or several named by braces. Torch-free."""

from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.config import Location


def expand(location: Location | Path) -> list[str]:
    """``runs/part-{0..2}`` → the three locations it stands for; anything else → itself."""
    return list(braceexpand(str(location)))


def child(location: Location | Path, name: str) -> str:
    """The file or folder ``name`` in ``location``; braces stay as they are."""
    return f"{str(location).rstrip('/')}/{name}"


def read_text(location: Location | Path) -> str:
    """A small text file. FileNotFoundError where there is none."""
    return Path(location).read_text()


def read_range(location: Location | Path, offset: int, size: int) -> bytes:
    """At most ``size`` bytes from ``offset`` on: fewer where the file ends. FileNotFoundError where there is none."""
    with Path(location).open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)
