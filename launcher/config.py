"""Configs of what runs where: pipelines (jobs with ``needs``) and clusters. Torch-free."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from data_pipeline.config import Config
from data_pipeline.errors import UsageError
from stpredict.config import load

JobName = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]


class PipelineJob(Config):
    """One job of a pipeline: a job's own config file, changed by ``set``, started after the jobs it ``needs``."""

    config: Path = Field(description="a job's YAML, relative to the pipeline file")
    needs: tuple[JobName, ...] = ()
    set: dict[str, Any] = Field({}, description="merged over the job's config; ${run:JOB} is the run of a needed job")


class PipelineConfig(Config):
    """A DAG of jobs. Every job's run directory is ``run``/JOB."""

    kind: Literal["pipeline"] = "pipeline"
    name: str
    vars: dict[str, Any] = Field({}, description="values of the pipeline's own, for ${vars.NAME}")
    run: Path = Field(default_factory=lambda fields: Path("runs") / fields.get("name", ""))
    jobs: dict[JobName, PipelineJob] = Field(min_length=1)


class ClusterConfig(Config):
    """This machine: every rank is a process here, and jobs run one after another."""

    kind: Literal["local"] = "local"
    threads: int | None = Field(None, ge=1, description="CPU threads per rank, where the job does not say")


def load_cluster(name: str, pipeline: Path) -> ClusterConfig:
    """The cluster ``name``: a YAML file, or the name of one in ``clusters/`` beside the folder of the pipeline file."""
    if name.endswith((".yaml", ".yml")):
        return load(ClusterConfig, name)
    folder = pipeline.resolve().parent.parent / "clusters"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"
        raise UsageError(f"no cluster {name!r}: {path} does not exist; clusters there: {known}; or give a .yaml file")
    return load(ClusterConfig, path)
