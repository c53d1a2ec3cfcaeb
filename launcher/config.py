"""Configs of what runs where: pipelines (jobs with ``needs``) and clusters. Torch-free."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from data_pipeline.config import Config
from data_pipeline.errors import UsageError
from stpredict.config import load
from stpredict.jobs.config import JobConfig, TimeLimit, minutes
from stpredict.studies.config import AnalysisConfig, Role

NAME = re.compile(r"\w[\w-]*")
LAUNCHER = "launcher"  # folder of a pipeline's run, and so no job's name


def _a_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits, _ and -, since folders are called so")
    if name == LAUNCHER:
        raise ValueError(f"{name!r} is the folder of what a launch writes; give the job another name")
    return name


JobName = Annotated[str, AfterValidator(_a_name)]
JobKind = Literal[
    "shard",
    "tokenizer",
    "encode",
    "prior",
    "forecaster",
    "generate",
    "reconstruct",
    "forecast",
    "evaluate",
    "report",
    "study_report",
    "merge",
]


class PipelineJob(Config):
    """One job of a pipeline: a job's own config file, changed by ``set``, started after the jobs it ``needs``."""

    config: Path | None = Field(
        None, description="a job's YAML, relative to the pipeline file (default: `set` is all of it)"
    )
    needs: tuple[JobName, ...] = ()
    after: tuple[JobName, ...] = Field((), description="jobs that must have ended before it starts, however they end")
    set: dict[str, Any] = Field({}, description="merged over the job's config; ${run:JOB} is the run of a needed job")
    array: int | None = Field(None, ge=1, description="tasks that write its shards together; a merge job follows them")
    trial: JobName | None = Field(None, description="jobs of one trial count as one for `at_once`; a study sets it")


class PipelineConfig(Config):
    """A DAG of jobs. Every job's run directory is ``run``/JOB."""

    kind: Literal["pipeline"] = "pipeline"
    name: str = Field(min_length=1, description="its run is runs/NAME, unless `run` says otherwise")
    vars: dict[str, Any] = Field({}, description="values of the pipeline's own, for ${vars.NAME}")
    run: Path = Field(default_factory=lambda fields: Path("runs") / fields.get("name", ""))
    at_once: int | None = Field(None, ge=1, description="trials (see jobs.JOB.trial) that run at once at most")
    jobs: dict[JobName, PipelineJob] = Field(min_length=1)


def _text_labels(values: Any) -> Any:
    """YAML takes a label like 32 for a number."""
    if not isinstance(values, dict | list):
        raise ValueError("give a list of values, or label → value")
    return {str(label): value for label, value in values.items()} if isinstance(values, dict) else values


def _text_points(point: Any) -> Any:
    if not isinstance(point, dict):
        raise ValueError(f"{point!r} names no axis; give axis: label, such as {{size: {point}}}")
    if several := next((axis for axis, label in point.items() if isinstance(label, list | dict)), None):
        raise ValueError(f"{several}: give one label; a point for each of several")
    return {axis: str(label) for axis, label in point.items()}


class Axis(Config):
    """One axis of a study's grid."""

    key: str | None = Field(
        None,
        description="what of `trial` its values are: prior.set.seed (default: each value is changes of `trial`)",
    )
    values: Annotated[list[Any] | dict[str, Any], BeforeValidator(_text_labels)] = Field(
        description="the values, or label → value"
    )
    role: Role = Field("other", description="what it is to the analysis (default: its name, where that is a role)")


def _with_roles(grid: Any) -> Any:
    """Axes that are called like a role have it."""
    if not isinstance(grid, dict):
        return grid
    own = {
        name: {"role": name, **axis} for name, axis in grid.items() if name in get_args(Role) and isinstance(axis, dict)
    }
    return {**grid, **own}


class StudyConfig(Config):
    """A grid of trials. ``jobs`` are done once; the jobs of ``trial`` for every point of ``grid``, as TRIAL-JOB."""

    kind: Literal["study"] = "study"
    name: str = Field(min_length=1, description="its run is runs/NAME, unless `run` says otherwise")
    vars: dict[str, Any] = Field({}, description="values of the study's own, for ${vars.NAME}")
    run: Path = Field(default_factory=lambda fields: Path("runs") / fields.get("name", ""))
    at_once: int | None = Field(
        None, ge=1, description="trials that run at once at most (default: as many as there is room for)"
    )
    jobs: dict[JobName, PipelineJob] = Field({})
    grid: Annotated[dict[JobName, Axis], BeforeValidator(_with_roles)] = Field(min_length=1)
    without: tuple[Annotated[dict[str, str], BeforeValidator(_text_points)], ...] = Field(
        (), description="points of the grid that are left out, as axis → label: {size: xl, lr: lr3e-3}"
    )
    trial: dict[JobName, PipelineJob] = Field(min_length=1)
    analysis: AnalysisConfig = AnalysisConfig()


class LocalCluster(Config):
    """This machine: every rank is a process here."""

    kind: Literal["local"] = "local"
    jobs: int = Field(1, ge=1, description="jobs that run at once; they share cores and GPUs")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank, where the job does not say (default: cores / jobs / processes)"
    )


class Apptainer(Config):
    """Ranks run in an image by Apptainer (Singularity). What jobs read and write has to be seen inside under the paths
    that it has outside; the home and the folder of the launch are."""

    kind: Literal["apptainer"] = "apptainer"
    image: str = Field(description=".sif file or, unpacked, a folder")
    binds: tuple[str, ...] = Field((), description="further folders of the host seen inside: /scratch")
    options: tuple[str, ...] = Field(("--nv",), description="further words for `apptainer exec`")


class Pyxis(Config):
    """Ranks run in an image by Pyxis, the container plug-in of srun (Enroot). What jobs read and write, and the folder
    of the launch, have to be seen inside under the paths that they have outside."""

    kind: Literal["pyxis"] = "pyxis"
    image: str = Field(description=".sqsh file or image name")
    mounts: tuple[str, ...] = Field((), description="folders of the host seen inside: /scratch:/scratch")
    options: tuple[str, ...] = Field((), description="further words for srun: --container-...")


def _one_line(line: str) -> str:
    if "\n" in line:
        raise ValueError("is several lines; give a list of lines")
    return line


class SlurmOptions(Config):
    """What SLURM is asked for on behalf of one job. What a job's own ``resources`` say comes first."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = Field(None, description="nodes not to use, in SLURM's form: gpu[003-006],gpu9")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a node; a job with fewer ranks there asks for fewer")
    gpu_request: str = Field(
        "gpus-per-node={gpus}",
        pattern=r"^[a-z-]+=.*\{gpus\}",
        description="sbatch's option that asks for GPUs of a node: gpus-per-node=a100:{gpus}, gres=gpu:a100:{gpus}",
    )
    ranks_per_node: int | None = Field(None, ge=1, description="ranks that a node takes (default: one per GPU, or one)")
    cpus_per_rank: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0, description="memory of a node that the job gets (default: SLURM's own)")
    time: TimeLimit = Field("24:00:00", description="limit, [D-]HH:MM:SS in quotes")
    exclusive: bool = Field(False, description="whole nodes, shared with nobody")
    options: dict[str, str | int | Literal[True]] = Field({}, description="any further option of sbatch, by its name")

    @property
    def minutes(self) -> int:
        return minutes(self.time)


class SlurmCluster(SlurmOptions):
    """A cluster under SLURM, and how to become ourselves on its compute nodes."""

    kind: Literal["slurm"] = "slurm"
    kinds: dict[JobKind, SlurmOptions] = Field({}, description="what differs for jobs of a kind")
    signal_delay_s: int = Field(
        300, ge=10, description="before its time limit a job is told to save: a step and a save"
    )
    retries: int = Field(2, ge=0, description="starts after failures of a job (not of its config), on other nodes")
    array_parallelism: int = Field(256, ge=1, description="tasks of an array that run at once")
    container: Apptainer | Pyxis | None = Field(None, discriminator="kind")
    python: str | None = Field(
        None, description="Python on the nodes: VENV/bin/python (default: this one; in a container `python3`)"
    )
    setup: tuple[Annotated[str, AfterValidator(_one_line)], ...] = Field(
        (), description="lines of the batch script before anything else: module load, source venv/bin/activate"
    )
    environment: dict[str, str] = Field({}, description="variables of the ranks: NCCL_*, GLOO_*")

    def options_of(self, kind: JobKind, config: JobConfig | None = None) -> SlurmOptions:
        """What SLURM is asked for by a job of ``kind``: the cluster's words, those for the kind, those of the job."""
        own = {}
        if config:
            resources = config.resources
            own = {"cpus_per_rank": resources.threads, "memory_gb": resources.memory_gb, "time": resources.time}
        general = {name: getattr(self, name) for name in SlurmOptions.model_fields}
        of_kind = self.kinds[kind].model_dump(exclude_unset=True) if kind in self.kinds else {}
        return SlurmOptions(**general | of_kind | {name: value for name, value in own.items() if value is not None})


ClusterConfig = LocalCluster | SlurmCluster
AnyCluster = Annotated[ClusterConfig, Field(discriminator="kind")]


def load_cluster(name: str, pipeline: Path | None = None) -> ClusterConfig:
    """The cluster ``name``: a YAML file, or the name of one in ``clusters/`` beside the folder of the pipeline file, if
    there is one, or in configs/clusters here."""
    if name.endswith((".yaml", ".yml")):
        return load(AnyCluster, name)
    beside = [pipeline.resolve().parent.parent / "clusters"] if pipeline else []
    folders = [*beside, Path("configs/clusters")]
    path = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if path is None and name == "local":
        return LocalCluster()
    if path is None:
        known = ", ".join(sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})) or "none"
        raise UsageError(
            f"no cluster {name!r} in {' or '.join(map(str, folders))}; there: {known}; or give a .yaml file"
        )
    return load(AnyCluster, path)
