"""What a launch leaves in the pipeline's run for the jobs, and for the commands that look after them:

pipeline.yaml             the pipeline, resolved
launcher/record.json      where it was launched, its jobs, and who does them
launcher/configs/JOB.yaml the jobs' configs, resolved
launcher/code/HASH/       the code that they run
launcher/slurm/JOB/       batch scripts and logs of SLURM
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, field_serializer

from data_pipeline.errors import UsageError
from launcher.config import LAUNCHER, AnyCluster, ClusterConfig, LocalCluster
from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig, JobConfig, PartedJobConfig
from stpredict.run import Run, write_atomically


class Submitted(BaseModel):
    """A SLURM job that does a job or, of an array's job, one ``part`` or the ``merge``."""

    slurm_id: str
    part: int | None = None
    merge: bool = False

    def of(self, job: str) -> str:
        """What it is called of ``job``: in SLURM, and the folder of SLURM's logs."""
        return f"{job}.merge" if self.merge else job

    def script(self, folder: Path, job: str) -> Path:
        """The batch script that was submitted; ``folder`` is that of the pipeline's run."""
        return folder / self.of(job) / f"{self.slurm_id.partition('_')[0]}_submission.sh"


class JobRecord(BaseModel):
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    fingerprint: str
    array: int | None = None
    trial: str | None = None
    behind: tuple[str, ...] = ()  # trials whose end it waits for, where only so many run at once
    submitted: list[Submitted] = []


class Record(BaseModel):
    """``cluster`` is the profile, ``cluster_name`` what it was called; ``code`` the hash of the code's copy,
    ``directory`` what relative paths in configs are relative to."""

    pipeline: str
    cluster_name: str
    cluster: AnyCluster = LocalCluster()
    code: str
    launched: str
    directory: str | None = None
    cancelled: str | None = None
    jobs: dict[str, JobRecord]

    @field_serializer("cluster")
    def _only_what_is_set(self, cluster: ClusterConfig) -> dict[str, Any]:
        # Read back, ``kinds`` must still tell what a kind of job changes from what it leaves as it is.
        return {"kind": cluster.kind, **cluster.model_dump(mode="json", exclude_unset=True)}

    def slurm_name(self, job: str) -> str:
        """What SLURM calls a job (JOB, or JOB.merge): by it ours are known where another SLURM had the same ids."""
        return f"{self.pipeline}.{job}"

    def slurm_ids(self) -> Iterator[str]:
        for job in self.jobs.values():
            for submitted in job.submitted:
                yield submitted.slurm_id


class PipelineRun:
    """Paths and small files of a pipeline's run."""

    def __init__(self, path: Path):
        self.path = Path(path)

    pipeline_path = property(lambda self: self.path / "pipeline.yaml")
    record_path = property(lambda self: self.path / LAUNCHER / "record.json")
    code = property(lambda self: self.path / LAUNCHER / "code")
    slurm = property(lambda self: self.path / LAUNCHER / "slurm")

    def config_path(self, job: str) -> Path:
        return self.path / LAUNCHER / "configs" / f"{job}.yaml"

    def slurm_folder(self, job: str) -> Path:
        return self.slurm / job

    def record(self) -> Record | None:
        """UsageError where it is damaged."""
        try:
            return Record.model_validate_json(self.record_path.read_text())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UsageError(f"{self.record_path}: damaged ({error.errors()[0]['msg']}); launch again") from None

    def write_record(self, record: Record) -> None:
        self.record_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.record_path, record.model_dump_json(indent=1) + "\n")

    def config(self, job: str) -> JobConfig:
        return load(AnyJobConfig, self.config_path(job))

    def name(self) -> str | None:
        """The name of the pipeline whose run this is; None where it is none."""
        try:
            return yaml.safe_load(self.pipeline_path.read_text())["name"]
        except (FileNotFoundError, TypeError, KeyError):
            return None


def pipeline_of(path: Path) -> tuple[Path, Record] | None:
    """The run of the pipeline, and what was launched there, of which the run directory ``path`` is a job."""
    folder = path.parent if len(path.parts) > 1 else path.absolute().parent
    record = PipelineRun(folder).record()
    return (folder, record) if record and path.absolute().name in record.jobs else None


def part_config(config: JobConfig, part: int | None, parts: int | None) -> JobConfig:
    """``config``, or that of its ``part`` of ``parts``."""
    if part is None:
        return config
    assert isinstance(config, PartedJobConfig)
    return config.model_copy(update={"part": part, "parts": parts})


def home_of(config: JobConfig, part: int | None, parts: int | None) -> Run:
    """The run directory of one who does ``config``."""
    return Run(part_config(config, part, parts).home)
