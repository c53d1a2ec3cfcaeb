"""Which code this is: the git commit and what differs from it. Torch-free."""

import json
import subprocess
from pathlib import Path

SOURCE_STATE = "source.json"  # beside the packages, where they are a copy that a launch made


def source_state(root: Path) -> dict[str, str | None]:
    """``git_commit`` and ``git_diff`` (against it, of tracked files) of the code in ``root``; None where there is no
    git checkout."""
    try:
        return json.loads((root / SOURCE_STATE).read_text())
    except FileNotFoundError:
        commit = output("git", "-C", str(root), "rev-parse", "HEAD")
        return {"git_commit": commit, "git_diff": output("git", "-C", str(root), "diff", "HEAD")}


def output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
