"""The code that a pipeline's jobs run: a copy made when it is launched. What is edited afterwards reaches no job."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from data_pipeline.disk import temporary_path
from stpredict.source import SOURCE_STATE, source_state

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "stpredict", "launcher")


def snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copies the packages in ``root`` to ``folder``/HASH, unless that is there, and returns it."""
    contents = _contents(root)  # read once: what is hashed is what is written
    code = folder / _hash(contents)
    if code.is_dir():
        return code
    temporary = temporary_path(code)
    try:
        for name, content in contents.items():
            copy = temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        (temporary / SOURCE_STATE).write_text(json.dumps(source_state(root), indent=1) + "\n")
        temporary.rename(code)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return code


def place_of(folder: Path, root: Path = ROOT) -> Path:
    """Where ``snapshot`` would copy the packages to."""
    return folder / _hash(_contents(root))


def _contents(root: Path) -> dict[str, bytes]:
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*")) if _is_code(path)]
    if not files:
        raise FileNotFoundError(f"{root}: no {' '.join(PACKAGES)} here")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _hash(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def environment_for(code: Path) -> dict[str, str]:
    """Variables by which Python imports the packages from ``code``, wherever it starts and whatever is installed."""
    before = os.environ.get("PYTHONPATH")
    path = f"{code.absolute()}{os.pathsep}{before}" if before else str(code.absolute())
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _is_code(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
