"""`stpredict launch --dry-run`: what a launch would do, and the batch scripts that it would submit. Writes nothing."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import UsageError
from launcher.config import ClusterConfig, PipelineConfig, SlurmCluster
from launcher.launch import Launch, executor_of, prepare
from launcher.pipeline import Job
from launcher.slurm.script import shape_of

console = Console(highlight=False, markup=False, soft_wrap=True)
WIDTH = 120  # however narrow the terminal: it may wrap lines, but nothing is cut short


def preview(
    pipeline: PipelineConfig,
    jobs: Sequence[Job],
    cluster: ClusterConfig,
    rerun: Collection[str],
    cluster_name: str,
    as_json: bool,
) -> None:
    """Prints it all, and then raises the UsageError that a launch would end with; says if that cannot be known here."""
    launch = prepare(pipeline, jobs, cluster, rerun, cluster_name)
    executor = executor_of(cluster)
    scripts = executor.scripts(launch)
    _show(launch, cluster, scripts, as_json)
    try:
        executor.check()
    except UsageError as error:
        print(f"note: whether the cluster takes these jobs is not known: {error}", file=sys.stderr)
    else:
        executor.check_jobs(launch)


def _show(launch: Launch, cluster: ClusterConfig, scripts: Mapping[str, str], as_json: bool) -> None:
    rows = [_row(job, cluster) | {"action": launch.actions[job.name]} for job in launch.jobs]
    if as_json:
        found = {"run": str(launch.run.path), "cluster": launch.record.cluster_name, "jobs": rows, "scripts": scripts}
        print(json.dumps(found, indent=1))
        return
    table = Table("job", "kind", "needs", "nodes x ranks", "array", "time", "partition", "would", box=box.SIMPLE)
    for row in rows:
        size = f"{row['nodes']} x {row['ranks_per_node']}"
        other = [str(row[key] or "") for key in ("array", "time", "partition", "action")]
        table.add_row(row["job"], row["kind"], ", ".join(row["needs"]), size, *other)
    for column in table.columns:
        column.no_wrap = column.header != "needs"
    for name, script in scripts.items():
        console.rule(f"{name}: sbatch script")
        print(script)
    Console(width=max(WIDTH, console.width)).print(table)  # last: pages of scripts would push it off the screen
    console.print(f"nothing is written or submitted; the run would be {launch.run.path}")


def _row(job: Job, cluster: ClusterConfig) -> dict[str, Any]:
    config = job.config
    row = {"job": job.name, "kind": config.kind, "needs": job.needs, "array": job.array, "run": str(job.run.path)}
    if not isinstance(cluster, SlurmCluster):
        return row | {"nodes": 1, "ranks_per_node": config.resources.processes, "time": None, "partition": None}
    shape, options = shape_of(cluster, config.kind, config, job.name), cluster.options_of(config.kind, config)
    size = {"nodes": shape.nodes, "ranks_per_node": shape.ranks_per_node}
    return row | size | {"time": options.time, "partition": options.partition}
