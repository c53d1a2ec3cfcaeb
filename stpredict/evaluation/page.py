"""What every page has: its look (page.html.j2), and where its numbers come from. Torch-free."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stpredict.evaluation import units
from stpredict.evaluation.run_facts import RunFacts

TEMPLATES = (Path(__file__).parent, Path(__file__).parents[1] / "studies")
FORMS = (units.duration, units.bytes, units.count, units.power, units.formula, units.four_digits)
FEW = 6  # runs that are named one by one


def render(template: str, title: str, facts: Sequence[RunFacts], **values: Any) -> str:
    """The page that ``template`` makes of ``values``; its head says what ``facts`` say of code and machines."""
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {form.__name__: form for form in FORMS}
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return pages.get_template(template).render(title=title, written=written, provenance=provenance(facts), **values)


def provenance(facts: list[RunFacts]) -> dict[str, str]:
    """Where the numbers come from: code, precision, machine. More than one of a kind, where the runs differ."""
    environments = [run.environment for run in facts if run.environment]
    return {
        "commit": _distinct(
            f"{e['git_commit'][:12]}{' with uncommitted changes' if e.get('git_diff') else ''}"
            for e in environments
            if e.get("git_commit")
        ),
        "precision": _precision(facts),
        "hardware": _distinct(_hardware(run) for run in facts if run.environment),
        "software": _distinct(_software(e) for e in environments),
    }


def _precision(facts: list[RunFacts]) -> str:
    of_run = {run.name: run.precision for run in facts if run.precision}
    if len(set(of_run.values())) > 1 and len(of_run) <= FEW:
        return ", ".join(f"{name} {precision}" for name, precision in of_run.items())
    return _distinct(of_run.values())


def _hardware(run: RunFacts) -> str:
    host = (run.status and run.status.host) or run.environment.get("host")
    cpus = run.environment.get("cpus")
    cores = f"{cpus} cores of {run.environment.get('cpu') or 'an unnamed CPU'}" if cpus else None
    return ", ".join(filter(None, [host, cores, *run.environment.get("gpus", []), run.environment.get("platform")]))


def _software(environment: dict[str, Any]) -> str:
    packages = environment.get("packages") or {}
    versions = {"Python": environment.get("python", "").split(" ")[0]}
    versions |= {name: packages.get(name, "") for name in ("torch", "deepspeed")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _distinct(values: Iterable[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, values)))
