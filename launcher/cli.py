"""The ``stpredict`` command. Each sub-command imports what it needs when it runs, so that ``--help`` is immediate."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_pipeline.errors import UsageError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, or config.yaml of an earlier run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="changes, e.g. training.steps=100 run=runs/b")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run or of a pipeline's run")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback()
def stpredict(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks (anywhere on the line)")] = False,
) -> None:
    """Train video and spatiotemporal predictors: tokenizers, priors and forecasters, from shards to reports.

    \b
    stpredict launch configs/pipelines/demo.yaml   the whole pipeline
    stpredict status runs/demo                     how far it is
    stpredict train configs/tokenizers/demo.yaml   one of its jobs

    Exit status: 0 done, 1 failed, 2 bad usage, 75 stopped early: run the same command again to continue.
    """
    if debug:
        os.environ["STPREDICT_DEBUG"] = "1"  # the ranks inherit it


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="folder of videos, or YAML of kind shard")],
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="directory to fill (default: the YAML's run)")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Make WebDataset shards and a manifest from a data set.

    \b
    stpredict shard ~/videos runs/shards workers=8   sub-folder = class
    stpredict shard configs/data/ucf101.yaml source.path=/data/UCF-101

    Killed, it goes on behind the last finished shard. docs/data.md says what each data set of configs/data expects.
    """
    from launcher import jobs

    raise typer.Exit(jobs.run(jobs.load_shard_job(source, out, overrides or ())))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="continue under another config than the run began with")
    ] = False,
) -> None:
    """Train a tokenizer or a prior: the config says which. Stopped, it continues from its last checkpoint.

    It may go on with other processes, another ZeRO stage and other intervals; what changes the result, more steps for
    instance, needs --force. docs/training.md explains every setting of `training`.

    \b
    stpredict train configs/tokenizers/demo.yaml run=runs/tokenizer
    stpredict train configs/tokenizers/demo.yaml training.precision=fp32 training.zero_stage=1
    stpredict train runs/tokenizer/config.yaml     the same again
    """
    if force:
        from stpredict.jobs.config import FORCE

        os.environ[FORCE] = "1"
    _run(config, overrides, "train")


@app.command()
def encode(config: Config, overrides: Overrides = None) -> None:
    """Cache the latents of every clip with a trained tokenizer.

    \b
    stpredict encode configs/data/encode.yaml tokenizer=runs/tokenizer data.shards=runs/shards
    """
    _run(config, overrides, "encode")


@app.command()
def merge(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="run that several jobs filled, or one shard set")],
) -> None:
    """Fold the parts that several jobs wrote into one manifest: the run is then like that of one job.

    \b
    stpredict shard CONFIG run=runs/x part=0 parts=8   and so on, up to part=7, at once or one after another
    stpredict merge runs/x
    """
    from launcher.parts import merge

    for folder, manifest in merge(path).items():
        left_out = f", {manifest.skipped} left out" if manifest.skipped else ""
        print(f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards{left_out}")


@app.command()
def generate(config: Config, overrides: Overrides = None) -> None:
    """Continue held-out videos: some frames given, the rest predicted. Writes .mp4, .gif and .npy.

    A config of kind reconstruct writes what a tokenizer makes of them instead.

    \b
    stpredict generate configs/priors/generate.yaml prior=RUN tokenizer=RUN data.shards=RUN
    stpredict generate configs/tokenizers/reconstruct.yaml tokenizer=RUN data.shards=RUN
    """
    _run(config, overrides, "generate")


@app.command()
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Measure what `generate` wrote: metrics.json, a table, pictures."""
    _run(config, overrides, "evaluate")


def _run(config: Path, overrides: list[str] | None, command: str) -> None:
    from launcher import jobs

    raise typer.Exit(jobs.run(jobs.load_job(config, overrides or (), command)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run, run of a pipeline, or YAML of kind report")],
    overrides: Overrides = None,
) -> None:
    """Write one self-contained HTML page about a run; prints its path last.

    Of a study's run: the study's report, of what is there now, with its pictures (PNG) and tables (CSV).

    \b
    stpredict report runs/demo
    """
    if run.is_file():
        _run(run, overrides, "report")
    if overrides:
        raise UsageError(f"{run} is no config file: there is nothing that {overrides[0]} could change")
    from launcher.overview import runs_of
    from launcher.study_run import report_of, write_report_of

    if study := report_of(run):
        print(write_report_of(study))
        return
    from stpredict.evaluation.report import write_report

    runs = {name: job.path for name, job in runs_of(run).items() if job.config_path.is_file()}
    print(write_report(run.resolve().name, runs, run / "report.html"))


@app.command()
def launch(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="YAML of kind pipeline, or one job's")],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="name in configs/clusters, or a YAML (default: here)")] = None,
    rerun: Annotated[list[str] | None, typer.Option(metavar="JOB", help="make JOB and what needs it anew")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print the jobs and their batch scripts; write nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Run the jobs of a pipeline, those that are missing or unfinished, in the order of their `needs`.

    Under SLURM all of them are submitted at once, or none. The jobs run a copy of the code made now. One job's YAML is
    launched as a pipeline of that job: its run is RUN/KIND.

    \b
    stpredict launch configs/pipelines/demo.yaml --cluster local
    stpredict launch configs/pipelines/demo.yaml --cluster slurm_single_machine --dry-run
    stpredict launch configs/pipelines/demo.yaml run=runs/mine
    stpredict launch configs/pipelines/demo.yaml --rerun prior
    """
    from launcher.config import LocalCluster, load_cluster
    from launcher.launch import launch
    from launcher.pipeline import load_pipeline

    where = load_cluster(cluster, pipeline) if cluster else LocalCluster()
    config, jobs = load_pipeline(pipeline, overrides or ())
    if dry_run:
        from launcher.preview import preview

        preview(config, jobs, where, rerun or (), cluster or "local", json)
    else:
        raise typer.Exit(launch(config, jobs, where, rerun or (), cluster or "local", as_json=json))


@app.command()
def study(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML of kind study")],
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="name in configs/clusters, or a YAML (default: here)")] = None,
    rerun: Annotated[
        list[str] | None, typer.Option(metavar="JOB", help="make anew: TRIAL, TRIAL-JOB, or JOB of every trial")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print the grid, the jobs and their batch scripts; write nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Run the trials of a grid, those that are missing or unfinished, and write a report: curves, fitted laws.

    A study is a pipeline of many jobs, TRIAL-JOB: status, logs, cancel and resume look after it as after any other.
    stpredict report RUN writes the report at any time, of what is there. Trials that fail hold up nothing; the same
    command again does them, and those of values that the grid has got since, and writes the report anew.

    \b
    stpredict study configs/studies/nbp_sizes_tiny.yaml
    stpredict study configs/studies/nbp_sizes_tiny.yaml 'grid.seed.values=[0,1,2]' at_once=2 --cluster local
    """
    from launcher.config import LocalCluster, load_cluster
    from launcher.launch import launch
    from launcher.study import headline, load_study

    where = load_cluster(cluster, study) if cluster else LocalCluster()
    found = load_study(study, overrides or ())
    if dry_run:
        from launcher.preview import preview

        preview(found.pipeline, found.jobs, where, rerun or (), cluster or "local", json, found.config)
    else:
        print(headline(found), file=sys.stderr)
        raise typer.Exit(launch(found.pipeline, found.jobs, where, rerun or (), cluster or "local", as_json=json))


@app.command()
def estimate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML of a training, a pipeline or a study; config.yaml of a run")
    ],
    overrides: Overrides = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="nodes (default: the fewest that hold it; of several trainings, as their configs say)"
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of a node (default: 8, or the most below that among which the batch divides)"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="a100-80g, h100, l40s, ... (default: the one here, or a100-80g)")
    ] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GB/S", help="between nodes, for each GPU (default: 25, 200 Gb/s HDR)")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="share of the GPU's peak that the model's FLOPs reach (default: 0.4)")
    ] = None,
    mfu_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="as measured in this run, less what it sent")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="tokens to train on, 300e9 (default: the config's steps)")
    ] = None,
    days: Annotated[float | None, typer.Option(help="on how many nodes is it done within so many days?")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="clips, for the size of a prior's cache of latents")] = None,
    json: Annotated[bool, typer.Option("--json", help="print all of it as JSON: bytes, seconds, FLOPs")] = False,
) -> None:
    """Say what a training takes before it is begun, and how to run it: parameters, FLOPs, memory, traffic, time.

    Trains nothing and needs neither a GPU nor data. It shows which ZeRO stages fit with which micro-batch, recommends
    one with the reasons and the overrides to paste, and names what is assumed. docs/estimates.md says how far to trust
    each number.

    \b
    stpredict estimate configs/priors/nbp_3b_k600.yaml
    stpredict estimate configs/priors/nbp_3b_k600.yaml --gpu h100 --nodes 4
    stpredict estimate configs/priors/nbp_3b_k600.yaml --tokens 300e9 --days 14
    stpredict estimate configs/priors/nbp_3b_k600.yaml --mfu-from runs/nbp_xl_k600
    stpredict estimate configs/pipelines/nbp.yaml --clips 400000
    stpredict estimate configs/studies/nbp_sizes.yaml --nodes 1
    """
    from launcher import estimates

    options = estimates.Options(nodes, gpus_per_node, gpu, network, mfu, mfu_from, tokens, days, clips)
    estimates.estimate(config, overrides or (), options, json)


@app.command()
def status(
    run: RunPath,
    json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="go on until all jobs have ended; Ctrl-C leaves")
    ] = False,
) -> None:
    """Show state, progress, loss and time left of a run, or of every job of a pipeline, also of those in SLURM's queue.

    \b
    queued (why)   SLURM has it; (Dependency): it waits for jobs that it needs
    requeued       it was preempted, or failed and is tried again: it continues by itself
    cancelled      it will not start, since a job that it needs failed, or since somebody cancelled it
    lost           it says that it is running, but its process, or SLURM's job, is gone
    up to date     an earlier launch did it

    elapsed: since its last start, of an array since the first part's; seen: since its last sign of life.

    The exit status is 0 whatever the states are. stpredict resume RUN goes on with what is not done.
    """
    from rich.console import Console

    from launcher import status as tables
    from launcher.overview import Slurm, rows

    slurm = Slurm()
    try:
        found = tables.watch(run, Console(stderr=json), slurm) if watch else rows(run, slurm)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    if slurm.note:
        print(f"note: {slurm.note}", file=sys.stderr)
    if json:
        print_json([row.model_dump() for row in found])
    elif not watch:
        tables.show(found, Console())


@app.command()
def logs(
    run: RunPath,
    job: Annotated[str | None, typer.Argument(help="job of the pipeline (default: the last one started)")] = None,
    rank: Annotated[int, typer.Option(help="rank of the job")] = 0,
    part: Annotated[
        int | None, typer.Option(help="task of an array, from 0 (default: one that failed, or the last one started)")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="wait for it to start, go on until it ends")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="lines from the end")] = 40,
    slurm: Annotated[bool, typer.Option("--slurm", help="what SLURM's batch script wrote, and srun")] = False,
    json: Annotated[bool, typer.Option("--json", help="every line as JSON: job, rank, line")] = False,
) -> None:
    """Print the log of a job's rank.

    \b
    stpredict logs runs/nbp prior -f          from SLURM's queue to the end, also over requeues
    stpredict logs runs/nbp prior --rank 9
    stpredict logs runs/nbp shards --part 3   of an array
    stpredict logs runs/nbp prior --slurm     where a job ended before its ranks began: printed by itself then
    """
    from launcher import logs as log_files

    try:
        reader = log_files.LogReader(run, job, rank, part, slurm)
        for line in reader.read(lines, follow):
            sys.stdout.write(reader.as_json(line) if json else line)
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def cancel(run: RunPath, json: Json = False) -> None:
    """End all jobs of a launched pipeline, or one job: in SLURM's queue, on its nodes, or here.

    Training saves before it ends, if SLURM leaves it the time (KillWait in its configuration, 30 s by default). What is
    done stays; stpredict resume RUN goes on.
    """
    from launcher.cancel import as_text
    from launcher.cancel import cancel as cancel_run

    ended = cancel_run(run)
    if json:
        print_json([job.model_dump() for job in ended])
    else:
        print("\n".join(as_text(ended, run)) if ended else f"{run}: nothing waits or runs; nothing to cancel")


@app.command()
def resume(
    run: RunPath,
    rerun: Annotated[list[str] | None, typer.Option(metavar="JOB", help="make JOB and what needs it anew")] = None,
    cluster: Annotated[str | None, typer.Option(help="go on elsewhere (default: where it was launched)")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print the jobs and their batch scripts; write nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Launch again what is missing or unfinished of a pipeline's run, or go on with a single job here.

    A job that a pipeline had in SLURM goes on with its pipeline. The configs are those that it was launched with, kept
    in the run: whatever became of the YAML files since. The code is the present one.

    \b
    stpredict resume runs/nbp
    stpredict resume runs/nbp --rerun prior
    stpredict resume runs/nbp --cluster local
    """
    from launcher import resume as resuming
    from launcher.launch import launch

    if not (run / "pipeline.yaml").is_file():
        given = {"--rerun": rerun, "--cluster": cluster, "--dry-run": dry_run, "--json": json}
        raise typer.Exit(resuming.resume_job(run, [option for option, value in given.items() if value]))
    found = resuming.resumable(run, cluster)
    if dry_run:
        from launcher.preview import preview

        preview(found.pipeline, found.jobs, found.cluster, rerun or (), found.cluster_name, json)
    else:
        raise typer.Exit(
            launch(found.pipeline, found.jobs, found.cluster, rerun or (), found.cluster_name, as_json=json)
        )


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="shard set, latent set, run, checkpoint or export; URLs, braces"),
    ],
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="write a contact sheet, .png or .jpg")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="decode every sample, and compare with the manifest; read checkpoints whole"),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes that verify (default: one per core)")] = None,
    json: Json = False,
) -> None:
    """Show what is in a shard set, latent set, run, checkpoint or export.

    \b
    stpredict inspect runs/shards --picture sheet.png   a row of frames a sample
    stpredict inspect runs/shards --verify              exit status 1 if damaged
    stpredict inspect runs/tokenizer                    its checkpoints, also those that are not complete
    stpredict inspect runs/tokenizer/checkpoints/step_00001000
    """
    from launcher import inspection

    raise typer.Exit(inspection.inspect(path, picture, verify, workers, json))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run of a training job, or one of its checkpoints")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write")],
    step: Annotated[int | None, typer.Option(help="step of the checkpoint (default: the newest sound one)")] = None,
    best: Annotated[bool, typer.Option("--best", help="the checkpoint best by training.checkpoint.best")] = False,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="averages, or the weights themselves (default: averages if there are)"),
    ] = None,
    format: Annotated[
        Literal["stpredict", "hf-llama"],
        typer.Option(help="hf-llama: that of transformers, for a prior of blocks of one token and rope_axes 1"),
    ] = "stpredict",
) -> None:
    """Write a checkpoint as safetensors + config, loadable without DeepSpeed; over 5 GB in several files.

    \b
    stpredict export runs/tokenizer exported
    stpredict export runs/tokenizer exported --step 1000 --no-ema
    stpredict export runs/tokenizer/checkpoints/step_00001000 exported
    stpredict export runs/next_token llama --format hf-llama
    """
    from launcher.progress import bytes_bar
    from stpredict.jobs.export import export_llama, export_run

    (export_llama if format == "hf-llama" else export_run)(run, out, bytes_bar, step, best, ema)
    print(out)


@app.command("import")
def import_(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="the authors' file, .pt or .safetensors")],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML of kind tokenizer or forecaster: model, data and run")
    ],
    overrides: Overrides = None,
) -> None:
    """Make an export of weights that a paper's authors published, in RUN/export, where other jobs find it.

    NBP's tokenizers, and SimVP as OpenSTL saves it. Nothing is trained; `training` of the config is not looked at.

    \b
    stpredict import nbp_k600.pt configs/tokenizers/nbp_k600.yaml run=runs/nbp_published
    stpredict import simvp_gsta.pth configs/forecasters/moving_mnist_gsta.yaml run=runs/openstl data.scaling.kind=unit
    """
    from launcher.jobs import load_job
    from stpredict.jobs.config import ForecasterJobConfig, TokenizerJobConfig

    job = load_job(config, overrides or (), "train")
    if not isinstance(job, TokenizerJobConfig | ForecasterJobConfig):
        raise UsageError(
            f"{config} has kind {job.kind}: weights of tokenizers and forecasters are imported; give one's config"
        )
    from stpredict.jobs.import_weights import import_forecaster, import_tokenizer

    print((import_forecaster if isinstance(job, ForecasterJobConfig) else import_tokenizer)(weights, job))


@app.command()
def doctor(
    cluster: Annotated[str | None, typer.Option(help="name in configs/clusters, or a YAML: look at its nodes")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the cluster to look at together")] = 1,
    processes: Annotated[int | None, typer.Option(min=1, help="ranks on them (default: as many as they take)")] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder for what it writes (default: runs/doctor-CLUSTER)")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="to wait for the job's start")] = 600,
    json: Json = False,
) -> None:
    """Check what works on this machine, and build DeepSpeed's CPU op once; or on a cluster's nodes, by a short job.

    \b
    stpredict doctor
    stpredict doctor --cluster a100_80g --nodes 2    before anything long: the nodes must be free

    On nodes: do the ranks see each other, how fast are collectives and the disk, do clocks and versions agree, does
    each rank see its GPUs, does the warning before the time limit reach it. Exit status 1 if something required fails.
    """
    if cluster is None:
        from launcher.doctor import doctor

        raise typer.Exit(doctor(json))
    from launcher.config import load_cluster
    from launcher.probe.run import examine

    where, name = load_cluster(cluster), Path(cluster).stem
    raise typer.Exit(examine(where, name, nodes, processes, run or Path("runs") / f"doctor-{name}", timeout, json))


def print_json(data: object) -> None:
    import json

    print(json.dumps(data, indent=1))


def main() -> None:
    """Runs the command; errors that a person can mend become one line, without a traceback."""
    # DeepSpeed calls ninja, which lies beside this Python even where its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # an option of every command
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    try:
        app(arguments, prog_name="stpredict")
    except UserError as error:
        _fail(str(error), error.exit_status)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error} (rerun with --debug for the traceback)", 1)


def _fail(message: str, exit_status: int) -> None:
    if os.environ.get("STPREDICT_DEBUG"):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_status)
