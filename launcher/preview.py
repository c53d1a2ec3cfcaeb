"""`stpredict launch --dry-run`: what a launch would do, and the batch scripts that it would submit. Writes nothing."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import UsageError
from launcher.config import ClusterConfig, PipelineConfig, SlurmCluster, StudyConfig
from launcher.grid import labels_of, shape
from launcher.launch import Launch, executor_of, prepare
from launcher.pipeline import Job
from launcher.slurm.queue import NoClusterError
from launcher.slurm.script import shape_of

console = Console(highlight=False, markup=False, soft_wrap=True)
LAST_COLUMNS = ("array", "time", "partition", "action")
WIDTH = 120  # however narrow the terminal: it may wrap lines, but nothing is cut short


def preview(
    pipeline: PipelineConfig,
    jobs: Sequence[Job],
    cluster: ClusterConfig,
    rerun: Collection[str],
    cluster_name: str,
    as_json: bool,
    study: StudyConfig | None = None,
) -> None:
    """Prints it all, and then raises the UsageError that a launch would end with; says if that cannot be known here.
    ``study`` is the one that the pipeline is."""
    launch = prepare(pipeline, jobs, cluster, rerun, cluster_name)
    executor = executor_of(cluster)
    scripts = executor.scripts(launch)
    rows = [_row(job, cluster) | {"action": launch.actions[job.name]} for job in launch.jobs]
    if as_json:
        grid = {"grid": _grid(study, jobs)} if study else {}
        found = {"run": str(launch.run.path), "cluster": launch.record.cluster_name}
        print(json.dumps({**found, **grid, "jobs": rows, "scripts": scripts}, indent=1))
    else:
        _show(launch, rows, scripts, study)
    try:
        executor.check()
    except UsageError as error:
        _not_known(error)
        return
    try:
        executor.check_jobs(launch)
    except NoClusterError as error:
        _not_known(error)


def _not_known(error: UsageError) -> None:
    print(f"note: whether the cluster takes these jobs is not known: {error}", file=sys.stderr)


def _show(
    launch: Launch, rows: Sequence[dict[str, Any]], scripts: Mapping[str, str], study: StudyConfig | None
) -> None:
    groups = _alike(rows)
    first = {group[0]["job"] for group in groups}
    for name, script in scripts.items():
        job = name.removesuffix(".merge")
        group = next(group for group in groups if any(row["job"] == job for row in group))
        if job in first:
            others = f" (as those of {len(group) - 1} other trials)" if len(group) > 1 else ""
            console.rule(f"{name}: sbatch script{others}")
            print(script)
    wide = Console(width=max(WIDTH, console.width))
    wide.print(_jobs_table(groups))  # last: pages of scripts would push it off the screen
    if study:
        wide.print(_grid_table(study))
        trials = len({row["trial"] for row in rows} - {None})
        at_once = f", {study.at_once} at once" if study.at_once else ""
        console.print(f"{shape(study, trials)}{at_once}")
    console.print(f"nothing is written or submitted; the run would be {launch.run.path}")


def _alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows, those together that differ in nothing but the trial."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        same = {key: value for key, value in row.items() if key not in ("job", "trial", "run", "needs")}
        groups.setdefault(str(same) if row["trial"] else row["job"], []).append(row)
    return list(groups.values())


def _jobs_table(groups: Sequence[Sequence[dict[str, Any]]]) -> Table:
    table = Table("job", "kind", "needs", "nodes x ranks", "array", "time", "partition", "would", box=box.SIMPLE)
    for first, *others in groups:
        name, needs = first["job"], ", ".join(first["needs"])
        if others:
            name = f"{first['role']} of {len(others) + 1} trials"
            needs = ", ".join(need.removeprefix(f"{first['trial']}-") for need in first["needs"])
        size = f"{first['nodes']} x {first['ranks_per_node']}"
        table.add_row(name, first["kind"], needs, size, *(_cell(first[key]) for key in LAST_COLUMNS))
    for column in table.columns:
        column.no_wrap = column.header != "needs"
    return table


def _grid_table(study: StudyConfig) -> Table:
    table = Table("axis", "changes", "values", box=box.SIMPLE)
    for name, axis in study.grid.items():
        table.add_row(name, axis.key or "several keys", "  ".join(labels_of(axis, name)))
    for point in study.without:
        table.add_row("left out", "", "  ".join(point.values()))
    return table


def _grid(study: StudyConfig, jobs: Sequence[Job]) -> dict[str, Any]:
    return {
        "axes": {name: {"key": axis.key, "labels": labels_of(axis, name)} for name, axis in study.grid.items()},
        "without": study.without,
        "at_once": study.at_once,
        "trials": list(dict.fromkeys(job.trial for job in jobs if job.trial)),
    }


def _row(job: Job, cluster: ClusterConfig) -> dict[str, Any]:
    config = job.config
    what = {"job": job.name, "trial": job.trial, "role": job.role, "kind": config.kind, "needs": job.needs}
    row = {**what, "array": job.array, "run": str(job.run.path)}
    if not isinstance(cluster, SlurmCluster):
        return row | {"nodes": 1, "ranks_per_node": config.resources.processes, "time": None, "partition": None}
    layout, options = shape_of(cluster, config.kind, config, job.name), cluster.options_of(config.kind, config)
    size = {"nodes": layout.nodes, "ranks_per_node": layout.ranks_per_node}
    return row | size | {"time": options.time, "partition": options.partition}


def _cell(value: Any) -> str:
    return str(value or "")
