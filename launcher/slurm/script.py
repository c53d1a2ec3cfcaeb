"""What goes into the batch scripts that submitit writes: options of sbatch and srun, lines before and after the ranks.

A script is: set-up lines, `srun` of the ranks, and `source after.sh`, which sees to a job that did not end well.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from launcher.config import Apptainer, JobKind, Pyxis, SlurmCluster
from launcher.slurm.failure import BEGIN
from launcher.snapshot import environment_for
from stpredict.jobs.config import JobConfig, minutes

WARNED_EARLY_S = 60  # SLURM's resolution: sbatch's manual, --signal
CODE_INSIDE = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}  # beside PYTHONPATH, in a container


@dataclass(frozen=True)
class Shape:
    """How a job's ranks lie on nodes."""

    nodes: int
    ranks_per_node: int


def shape_of(cluster: SlurmCluster, kind: JobKind, config: JobConfig | None, name: str) -> Shape:
    """UsageError where the job's ranks do not fill their nodes evenly."""
    if config is None:
        return Shape(1, 1)
    options, ranks, nodes = cluster.options_of(kind, config), config.resources.processes, config.resources.nodes
    room = options.ranks_per_node or options.gpus_per_node or 1
    if nodes is None:
        nodes = math.ceil(ranks / room)
    if ranks % nodes:
        raise UsageError(
            f"job {name!r}: {ranks} processes do not spread evenly over {nodes} nodes; resources.processes must be a "
            "multiple of the nodes"
        )
    if ranks // nodes > room:
        raise UsageError(
            f"job {name!r}: {ranks} processes on {nodes} nodes are {ranks // nodes} each, and a node of this cluster "
            f"takes {room} (ranks_per_node, gpus_per_node); give more resources.nodes"
        )
    return Shape(nodes, ranks // nodes)


def _check_time(cluster: SlurmCluster, time: str, name: str) -> None:
    """UsageError where a start may be told to stop before it has begun, and so the next one, without end."""
    if minutes(time) * 60 <= cluster.signal_delay_s + WARNED_EARLY_S:
        raise UsageError(
            f"job {name!r}: its time limit is {time}, and it is told to save {cluster.signal_delay_s} s before that "
            f"(signal_delay_s of the profile), or up to {WARNED_EARLY_S} s earlier: it would start again and again, "
            "and do nothing; give more time (resources.time, or time of the profile), or a shorter signal_delay_s"
        )


def parameters(
    cluster: SlurmCluster,
    kind: JobKind,
    name: str,
    config: JobConfig | None,
    code: Path,
    after: Sequence[str],
    dependencies: Sequence[str] = (),
) -> dict[str, Any]:
    """submitit's parameters for one job. ``after`` are the arguments of the program that decides about a failed job;
    ``dependencies`` are terms of sbatch's --dependency that must all come true. UsageError where its ranks or its time
    cannot be."""
    options, shape = cluster.options_of(kind, config), shape_of(cluster, kind, config, name)
    _check_time(cluster, options.time, name)
    cpus = options.cpus_per_rank
    gpus = min(options.gpus_per_node, shape.ranks_per_node) if not options.exclusive else options.gpus_per_node
    additional: dict[str, Any] = {"requeue": True, "hold": True, "chdir": str(Path.cwd()), **options.options}
    if gpus:
        option, _, value = options.gpu_request.partition("=")
        additional[option] = value.format(gpus=gpus)
    if dependencies:
        additional |= {"dependency": ",".join(dependencies), "kill-on-invalid-dep": "yes"}
    variables = {"OMP_NUM_THREADS": str(cpus), **_code_for(cluster, code), **cluster.environment}
    setup = [
        BEGIN,
        *cluster.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]
    decide = f"{python_on_host(cluster)} -m launcher.slurm.after {shlex.join(after)}"
    teardown = [f"source {shlex.quote(str((code / 'launcher' / 'slurm' / 'after.sh').absolute()))} $? {decide}"]
    given = {
        "job_name": name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.ranks_per_node,
        "cpus_per_task": cpus,
        "mem": f"{math.ceil(options.memory_gb * 1024)}M" if options.memory_gb else None,
        "time": options.minutes,
        "exclusive": options.exclusive or None,
        "signal_delay_s": cluster.signal_delay_s,
        "array_parallelism": cluster.array_parallelism,
        "additional_parameters": additional,
        "srun_args": srun_arguments(cluster, cpus),
        "setup": setup,
        "teardown": teardown,
    }
    return {key: value for key, value in given.items() if value is not None}


def srun_arguments(cluster: SlurmCluster, cpus: int) -> list[str]:
    # srun does not inherit --cpus-per-task since 22.05; without --kill-on-bad-exit it waits for the ranks that a failed
    # one left alone; and it truncates what it writes when a job starts again.
    arguments = [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", "--open-mode=append"]
    if isinstance(cluster.container, Pyxis):
        arguments += _pyxis(cluster.container)
    return arguments


def _code_for(cluster: SlurmCluster, code: Path) -> dict[str, str]:
    """Variables by which ranks import the packages from ``code``, whatever else their container has."""
    if cluster.container is None:
        return environment_for(code)
    # The login node's own PYTHONPATH, and packages in the home, are for another Python than the image's.
    variables = {**CODE_INSIDE, "PYTHONPATH": str(code.absolute())}
    if isinstance(cluster.container, Apptainer):  # under this name a variable wins over the image's
        return variables | {f"APPTAINERENV_{name}": value for name, value in variables.items()}
    return variables


def python_of(cluster: SlurmCluster) -> str:
    """The words by which a rank starts Python, in its container if there is one."""
    python = cluster.python or ("python3" if cluster.container else shlex.quote(sys.executable))
    match cluster.container:
        case Apptainer() as container:
            binds = [f"--bind={bind}" for bind in container.binds]
            return f"{shlex.join(['apptainer', 'exec', *container.options, *binds, container.image])} {python}"
    return python


def python_on_host(cluster: SlurmCluster) -> str:
    """The same for the batch script, which is in no container: there srun is what gets into Pyxis'."""
    if isinstance(cluster.container, Pyxis):
        return f"{shlex.join(['srun', '--nodes=1', '--ntasks=1', *_pyxis(cluster.container)])} {python_of(cluster)}"
    return python_of(cluster)


def _pyxis(container: Pyxis) -> list[str]:
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    # Of a variable that the image has too, srun's value holds for those named here.
    ours = f"--container-env=PYTHONPATH,{','.join(CODE_INSIDE)}"
    where = f"--container-workdir={Path.cwd()}"
    return [f"--container-image={container.image}", *mounts, where, ours, *container.options]
