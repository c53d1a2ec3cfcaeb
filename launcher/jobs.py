"""One job from the command line: reading its config, and becoming one of its ranks or starting them."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher import local, ranks
from launcher.parts import whole_is_done
from launcher.rank import leave
from launcher.rundir import is_done, locked, prepare, put_back, refuse_foreign
from stpredict.config import apply_overrides, read_yaml, resolve, validate
from stpredict.jobs.config import AnyJobConfig, JobConfig, PartedJobConfig
from stpredict.jobs.start import command_of, start
from stpredict.run import Run
from stpredict.training.signals import StopRequest


def load_job(path: Path, overrides: Sequence[str], command: str) -> JobConfig:
    """The job config in ``path``. UsageError if another command than ``command`` is the one for it."""
    data = resolve(apply_overrides(read_yaml(path), overrides), path)
    kind = data.get("kind")
    if kind == "pipeline":
        raise UsageError(f"{path} is a pipeline: use `stpredict launch {path}`")
    config = validate(AnyJobConfig, data, path)
    if command_of(config.kind) != command:
        raise UsageError(f"{path} has kind {config.kind}: use `stpredict {command_of(config.kind)} {path}`")
    return config


def run(config: JobConfig) -> int:
    """Runs the job with the ranks that this process finds itself among; finding none, starts them here."""
    place = ranks.join()
    if place is not None:
        with StopRequest():  # while it waits for the directory, too
            leave(join(config, place))
    code = local.run_job(config)
    if code == 0:
        _print_result(config)
    return code


def result_of(config: JobConfig) -> Path:
    """What a person opens first of a finished job."""
    return config.run / "report.html" if config.kind in ("report", "study_report") else config.run


def _print_result(config: JobConfig) -> None:
    if config.kind == "evaluate":
        from stpredict.evaluation.said import said_of

        print(said_of(config.run / "metrics.json"))
    print(result_of(config))
    if isinstance(config, PartedJobConfig) and config.parts > 1 and not whole_is_done(config):
        line = f"part {config.part} of {config.parts} is written; after all of them: stpredict merge {config.run}"
        print(line, file=sys.stderr)


def join(config: JobConfig, place: ranks.Ranks, print_of: str | None = None) -> int:
    """Does the job as one of its ranks, and returns its exit status. ``print_of`` is its fingerprint in a pipeline.

    Only rank 0 touches what the run directory says of itself: should it be refused, the other ranks, which cannot
    know, change nothing there of the job that is going on."""
    run = Run(config.home)
    if whole_is_done(config):
        return 0
    with ExitStack() as stack:
        if place.rank == 0:
            refuse_foreign(run.path)
            stack.enter_context(locked(run.path))
        if is_done(run, config):
            return 0
        config.check_ranks(place.world_size)
        before = prepare(run, config, print_of) if place.rank == 0 else None
        code = start(config, shared_terminal=True)
        if code == UsageError.exit_status:
            put_back(run, before)
        return code


def load_shard_job(source: Path, out: str | None, overrides: Sequence[str]) -> JobConfig:
    """``source`` is a folder of videos to shard into ``out``, or a YAML of kind shard whose run ``out`` replaces.
    An ``out`` like key=value is the first of the overrides, unless there is a directory of that name."""
    if out is not None and "=" in out and not Path(out).exists():
        out, overrides = None, [out, *overrides]
    if out is not None and "://" in out:
        raise UsageError(f"{out}: shards are written to a folder; copy it to the object store afterwards")
    if source.is_file() and source.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{source}: is a file; give a folder of videos, or a YAML of kind shard")
    if source.is_file():
        return load_job(source, [*overrides, *([f"run={out}"] if out else [])], "shard")
    if out is None:
        raise UsageError(f"give the directory to fill: stpredict shard {source} OUT")
    data = OmegaConf.create({"kind": "shard", "run": out, "source": {"kind": "folder", "path": str(source)}})
    return validate(AnyJobConfig, resolve(apply_overrides(data, overrides), source), source)
