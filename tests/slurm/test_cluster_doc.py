"""The commands of docs/cluster.md, run in their order on a real SLURM; what they print is what the page shows."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import bounded
from tests.slurm.conftest import ROOT

pytestmark = pytest.mark.slurm
PAGE = ROOT / "docs" / "cluster.md"
LEFT_OUT = "…"


class Command(NamedTuple):
    line: str
    shown: list[str]


def commands(text: str) -> list[Command]:
    """The commands, lines with a ``$``, of the page's console blocks, and what is shown below each."""
    found: list[Command] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.S | re.M):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Command(line.removeprefix("$ "), []))
            else:
                found[-1].shown.append(line)
    return found


def normal(line: str) -> str:
    """A line without what differs from one time to the next: numbers, and how wide columns are."""
    return " ".join(re.sub(r"\d+(?:[.,:]\d+)*", "0", line).split())


def missing(command: Command, printed: str) -> list[str]:
    """The lines that are shown and were not printed, in this order."""
    lines = iter(normal(line) for line in printed.splitlines() if line.strip())
    return [
        shown for shown in command.shown if shown != LEFT_OUT and not any(_shows(normal(shown), line) for line in lines)
    ]


def _shows(shown: str, line: str) -> bool:
    """Columns at the end may be left out."""
    return line == shown or line.startswith(f"{shown} ")


def test_every_command_of_the_page_succeeds_and_prints_what_is_shown(slurm, tmp_path):
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    script, found = [], commands(PAGE.read_text())
    assert len(found) > 10
    for number, command in enumerate(found):
        script.append(f"{{ {command.line}\n}} >out.{number} 2>&1 || {{ echo {number} $?; exit 1; }}")
    environment = {**slurm.environment, "COLUMNS": "120"}
    (tmp_path / "page.sh").write_text("\n".join(script))
    result: subprocess.CompletedProcess = bounded(
        ["bash", tmp_path / "page.sh"], timeout_s=400, cwd=tmp_path, env=environment
    )
    for number, command in enumerate(found):
        file: Path = tmp_path / f"out.{number}"
        printed = file.read_text() if file.exists() else "it was not run"
        assert not missing(command, printed), f"{command.line}:\n{printed}"
    assert result.returncode == 0, result.stdout


def test_a_page_that_shows_what_was_not_printed_is_noticed():
    (command,) = commands("text\n```console\n$ status $RUN\nshards   done  28/28\n…\nprior done\n```\n")
    assert command == ("status $RUN", ["shards   done  28/28", "…", "prior done"])
    assert not missing(command, "job state\n shards done 48/48 samples 0:21\nx\nprior  done  20/20\n")
    assert missing(command, "shards failed 48/48\nprior done") == ["shards   done  28/28", "prior done"]
    assert missing(command, "prior done\nshards done 28/28") == ["prior done"]
