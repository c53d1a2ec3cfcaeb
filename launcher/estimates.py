"""``stpredict estimate``: what a training, a pipeline or a study takes, before it is begun.

Values that a config leaves open (???) and that an estimate does not need may stay so. Torch is imported when all that
can be wrong with the command line has been said.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from data_pipeline.errors import UsageError
from launcher.pipeline import Job, load_pipeline
from launcher.planned_latents import OPEN, tokenizer_in_steps, with_latent
from launcher.study import load_study
from stpredict.config import apply_overrides, flat, read_yaml, resolve, validate
from stpredict.estimates.machine import gpus_of_a_node
from stpredict.jobs.config import AnyJobConfig, JobConfig, PriorJobConfig, TrainingJobConfig
from stpredict.run import Run

if TYPE_CHECKING:
    from stpredict.estimates.estimate import Asked


@dataclass(frozen=True)
class Options:
    """The command line's."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    network: float | None = None
    mfu: float | None = None
    mfu_from: Path | None = None
    tokens: float | None = None
    days: float | None = None
    clips: int | None = None


def load_training(path: Path, overrides: Sequence[str] = ()) -> TrainingJobConfig:
    """The config of a training, in which values may be left open."""
    node = apply_overrides(read_yaml(path), overrides)
    for key in OmegaConf.missing_keys(node):
        OmegaConf.update(node, key, _stand_in(key))
    config: JobConfig = validate(AnyJobConfig, resolve(node, path), path)
    if not isinstance(config, TrainingJobConfig):
        raise UsageError(
            f"{path} has kind {config.kind}: trainings are estimated (tokenizer, prior, forecaster), pipelines and "
            "studies"
        )
    return with_latent(config) if isinstance(config, PriorJobConfig) else config


def load_trainings(jobs: Sequence[Job]) -> dict[str, TrainingJobConfig]:
    """Those among a pipeline's jobs, by name. UsageError where there are none."""
    found = {job.name: job.config for job in jobs if isinstance(job.config, TrainingJobConfig)}
    if not found:
        raise UsageError("it has no training (tokenizer, prior, forecaster) among its jobs: nothing to estimate")
    return {
        name: with_latent(config, jobs) if isinstance(config, PriorJobConfig) else config
        for name, config in found.items()
    }


def _tokenizers(trainings: Mapping[str, TrainingJobConfig], jobs: Sequence[Job]):
    return {name: tokenizer_in_steps(config, jobs) for name, config in trainings.items()}


def _stand_in(key: str) -> Any:
    return {"latents": OPEN} if key.split(".")[-1] == "data" else OPEN


def _filled(path: Path, overrides: Sequence[str]) -> list[str]:
    """``overrides``, and stand-ins for what a pipeline, a study and their jobs' configs leave open."""
    node = apply_overrides(read_yaml(path), overrides)
    more = [_override(key, key) for key in OmegaConf.missing_keys(node)]
    node = apply_overrides(node, more)
    for section in ("jobs", "trial"):
        for name, job in (node.get(section) or {}).items():
            more += [_override(f"{section}.{name}.set.{key}", key) for key in _open_in_job(job, path)]
    return [*overrides, *more]


def _open_in_job(job: Any, path: Path) -> list[str]:
    """Keys that the job's config and ``set`` leave open, whatever its interpolations come to."""
    if not isinstance(job, Mapping):
        return []  # what is wrong with it is said when it is loaded
    file = path.parent / str(job.get("config") or "")
    base = read_yaml(file) if file.is_file() else OmegaConf.create()
    given = OmegaConf.create(OmegaConf.to_container(job.get("set") or OmegaConf.create(), resolve=False))
    merged = OmegaConf.to_container(OmegaConf.merge(base, given), resolve=False)
    return [key for key, value in flat(merged).items() if value == "???"]


def _override(path: str, key: str) -> str:
    value = _stand_in(key)
    return f"{path}={json.dumps(value)}"


def asked(options: Options) -> "Asked":
    """UsageError or UserError for what is wrong with the command line. Imports torch."""
    _check(options)
    from stpredict.estimates.duration import ASSUMED_MFU, NETWORK_GB_S, Utilization, median_mfu
    from stpredict.estimates.estimate import Asked, measured, this_gpu
    from stpredict.estimates.planned import plan_training

    gpu, source = this_gpu(options.gpu)
    network = NETWORK_GB_S if options.network is None else options.network
    if options.mfu_from is not None:
        run = Run(options.mfu_from)
        median_mfu(run)  # what has none is no run of a training
        try:
            config = load_training(run.config_path)
            utilization = measured(run, plan_training(config, tokenizer_in_steps(config)), gpu, network)
        except UsageError as error:
            raise UsageError(f"--mfu-from {run.path}: {error}") from None
    else:
        utilization = Utilization(ASSUMED_MFU if options.mfu is None else options.mfu)
    return Asked(utilization, gpu, source, options.nodes, options.gpus_per_node, network, options.tokens, options.days)


def _check(options: Options) -> None:
    if options.mfu is not None and options.mfu_from is not None:
        raise UsageError("give --mfu or --mfu-from, not both")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UsageError(f"--mfu {options.mfu:g}: a share of the GPU's peak, above 0 and at most 1; 0.4 is usual")
    if options.nodes is not None and options.days is not None:
        raise UsageError("--days asks how many nodes are needed: leave out --nodes")
    for name in ("tokens", "days", "network"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g}: give a finite number above 0")
    if options.gpu is not None:
        from stpredict.estimates.gpus import find_gpu

        find_gpu(options.gpu)


def estimate(path: Path, overrides: Sequence[str], options: Options, as_json: bool) -> None:
    """Prints it."""
    _check(options)
    kind = read_yaml(path).get("kind")
    if options.days is not None and kind in ("pipeline", "study"):
        raise UsageError(f"--days: {path} has several trainings; give it for one of them, or --nodes for all")
    if kind == "pipeline":
        answer = _pipeline(load_pipeline(path, _filled(path, overrides))[1], options, path)
    elif kind == "study":
        answer = _study(path, overrides, options)
    else:
        answer = _training(load_training(path, overrides), options, path)
    facts, show = answer
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show()


def _training(config: TrainingJobConfig, options: Options, path: Path):
    gpus_of_a_node(config.training.batch_size, options.nodes, options.gpus_per_node)
    if options.clips is not None and not isinstance(config, PriorJobConfig):
        raise UsageError("--clips is for the cache of latents that a prior reads: leave it out")
    from stpredict.estimates.estimate import as_json, estimate_training
    from stpredict.estimates.planned import plan_training

    question = asked(options)
    found = estimate_training(plan_training(config, tokenizer_in_steps(config)), question)
    facts = {"config": str(path), "kind": config.kind, **as_json(found)}
    if options.clips is not None:
        facts["latents"] = _latent_cache(config, options.clips)

    def show() -> None:
        from launcher.estimate_tables import show_training

        show_training(path.name, found, facts.get("latents"))

    return facts, show


def _latent_cache(config: PriorJobConfig, clips: int) -> dict[str, int]:
    """Of what a prior reads."""
    from stpredict.estimates.disk import latent_cache

    cache = latent_cache(config.latent.grid, config.latent.codebook_size, clips)
    return {"clips": clips, "per_clip_bytes": cache.per_clip, "bytes": cache.total}


def _pipeline(jobs: Sequence[Job], options: Options, path: Path):
    trainings = load_trainings(jobs)
    prior = next((config for config in trainings.values() if isinstance(config, PriorJobConfig)), None)
    if options.clips is not None and prior is None:
        raise UsageError(
            f"--clips is for the cache of latents that a prior reads, and {path} trains none: leave it out"
        )
    from stpredict.estimates.several import estimate_several

    question = asked(options)
    rows = estimate_several(trainings, question, True, _tokenizers(trainings, jobs))
    facts = {"config": str(path), "kind": "pipeline", "trainings": [row.as_json() for row in rows]}
    if options.clips is not None:
        facts["latents"] = _latent_cache(prior, options.clips)
    facts["gpu_hours"] = sum(row.gpu_hours for row in rows)
    facts["disk_bytes"] = sum(row.disk_bytes for row in rows) + facts.get("latents", {}).get("bytes", 0)
    facts["not_counted"] = _others(jobs)

    def show() -> None:
        from launcher.estimate_tables import show_several

        show_several(path.name, rows, question, facts)

    return facts, show


def _others(jobs: Sequence[Job]) -> list[str]:
    """Kinds of the jobs that are no trainings, whose FLOPs and disk are not known."""
    return sorted({job.config.kind for job in jobs if not isinstance(job.config, TrainingJobConfig)})


def _study(path: Path, overrides: Sequence[str], options: Options):
    if options.clips is not None:
        raise UsageError(f"--clips: {path} is a study, whose latents are not counted: give it for one of its priors")
    study = load_study(path, _filled(path, overrides))
    trainings = load_trainings(study.jobs)
    from stpredict.estimates.several import estimate_several, makespan_s

    question = asked(options)
    rows = estimate_several(trainings, question, False, _tokenizers(trainings, study.jobs))
    trial_of = {job.name: job.trial for job in study.jobs}
    per_trial: dict[str, float] = {}
    once = 0.0
    for row in rows:
        if trial := trial_of[row.name]:
            per_trial[trial] = per_trial.get(trial, 0.0) + row.seconds
        else:
            once += row.seconds
    at_once = study.config.at_once or len(per_trial)
    facts = {
        "config": str(path),
        "kind": "study",
        "trials": len(per_trial),
        "at_once": at_once,
        "trainings": [row.as_json() for row in rows],
        "gpu_hours": sum(row.gpu_hours for row in rows),
        "disk_bytes": sum(row.disk_bytes for row in rows),
        "days": (once + makespan_s(list(per_trial.values()), at_once)) / 86400,
        "not_counted": _others(study.jobs),
    }

    def show() -> None:
        from launcher.estimate_tables import show_several

        show_several(path.name, rows, question, facts)

    return facts, show
