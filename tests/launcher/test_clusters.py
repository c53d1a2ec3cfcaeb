"""Cluster profiles, and the batch scripts that are made from them."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import submitit

from data_pipeline.errors import UsageError
from launcher.config import Apptainer, LocalCluster, Pyxis, SlurmCluster, load_cluster
from launcher.slurm.script import parameters, python_of
from stpredict.config import load, validate
from stpredict.jobs.config import AnyJobConfig, Resources

PROFILES = sorted(Path("configs/clusters").glob("*.yaml"))
CODE = Path("/shared/run/launcher/code/abc")


def job(kind: str = "tokenizer", **resources):
    path = {"tokenizer": "tokenizers/demo.yaml", "shard": "data/moving_digits.yaml", "report": "priors/report.yaml"}
    config = load(AnyJobConfig, f"configs/{path[kind]}")
    return config.model_copy(update={"resources": Resources(**resources)})


def script(cluster: SlurmCluster, kind: str, config, folder: Path) -> str:
    """The text that submitit would give sbatch."""
    executor = submitit.SlurmExecutor(folder=folder, python=python_of(cluster))
    executor.update_parameters(**parameters(cluster, kind, "p.job", config, CODE, ["/run", "job"], ["afterok:7:8"]))
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def options(text: str) -> dict[str, str]:
    """sbatch's options in a script."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: shlex.split(value)[0] if value else "" for name, _, value in (line.partition("=") for line in lines)}


def srun(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def exports(text: str) -> dict[str, str]:
    words = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("export ")]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_loads_and_makes_scripts_for_every_kind_of_job(path, tmp_path):
    cluster = load_cluster(str(path), Path("configs/pipelines/demo.yaml"))
    if isinstance(cluster, LocalCluster):
        return
    for kind, config in (("tokenizer", job(processes=2)), ("report", job("report")), ("merge", None)):
        text = script(cluster, kind, config, tmp_path)
        assert options(text)["partition"] == cluster.options_of(kind).partition
        assert options(text)["dependency"] == "afterok:7:8"
        assert srun(text)[0] == "srun"


@pytest.mark.parametrize(("time", "delay", "refused"), [("00:07:00", 360, True), ("00:08:00", 360, False)])
def test_a_time_limit_within_which_a_job_would_only_be_told_to_stop_is_refused(tmp_path, time, delay, refused):
    cluster = SlurmCluster(signal_delay_s=delay)
    with (
        pytest.raises(UsageError, match="limit is 00:07:00, and it is told to save 360 s before that")
        if refused
        else nullcontext()
    ):
        script(cluster, "tokenizer", job(time=time), tmp_path)


def test_the_a100_profile_asks_for_whole_nodes_of_gpus_and_for_a_cpu_where_no_gpu_helps(tmp_path):
    cluster = load_cluster("a100_80g", Path("configs/pipelines/demo.yaml"))
    training = options(script(cluster, "tokenizer", job(processes=16), tmp_path))
    wanted = {"partition": "gpu", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "16"}
    assert training.items() >= {**wanted, "mem": "983040M", "time": "1440", "signal": "USR2@600"}.items()
    for kind, config in (("merge", None), ("report", job("report")), ("shard", job("shard"))):
        found = options(script(cluster, kind, config, tmp_path))
        assert found["partition"] == "cpu"
        assert not [name for name in found if "gpu" in name or "gres" in name]


@pytest.mark.parametrize("request_", ["gres=gpu:a100:{gpus}", "gpus-per-node=a100:{gpus}"])
def test_gpus_are_asked_for_by_the_option_that_the_profile_names_and_never_by_task(tmp_path, request_):
    cluster = SlurmCluster(gpus_per_node=8, gpu_request=request_)
    text = script(cluster, "tokenizer", job(processes=4), tmp_path)
    name, _, value = request_.partition("=")
    assert options(text)[name] == value.format(gpus=4)
    # DeepSpeed takes device LOCAL_RANK of those it sees: every rank has to see all.
    assert [option for option in options(text) if "gpu" in option or "gres" in option] == [name]
    assert not [word for word in srun(text) if word.startswith(("--gpu", "--gres"))]


def test_a_gpu_request_without_a_place_for_their_number_is_refused():
    with pytest.raises(UsageError, match="gpu_request"):
        validate(SlurmCluster, {"gpu_request": "gres=gpu:8"}, "x.yaml")


def test_without_a_container_ranks_are_started_by_the_given_python_and_import_the_copied_code(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = script(SlurmCluster(python="/venv/bin/python", cpus_per_rank=3), "tokenizer", job(), tmp_path)
    assert srun(text)[-5:-2] == ["/venv/bin/python", "-u", "-m"]
    assert {"--cpus-per-task=3", "--kill-on-bad-exit=1"} <= set(srun(text))
    assert exports(text).items() >= {"PYTHONPATH": str(CODE), "PYTHONSAFEPATH": "1"}.items()
    assert srun(script(SlurmCluster(), "tokenizer", job(), tmp_path))[-5] == sys.executable


def test_with_apptainer_ranks_and_the_decision_after_a_failure_run_in_the_image(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/login/node")
    cluster = SlurmCluster(container=Apptainer(image="/shared/a b.sif", binds=("/shared", "/scratch")))
    text = script(cluster, "tokenizer", job(), tmp_path)
    inside = ["apptainer", "exec", "--nv", "--bind=/shared", "--bind=/scratch", "/shared/a b.sif", "python3"]
    words = srun(text)
    start = words.index("apptainer")
    assert words[start:] == [*inside, "-u", "-m", "submitit.core._submit", str(tmp_path)]
    (after,) = [line for line in text.splitlines() if line.startswith("source ")]
    assert shlex.split(after)[1:] == [
        f"{CODE}/launcher/slurm/after.sh", "$?", *inside, "-m", "launcher.slurm.after", "/run", "job",
    ]  # fmt: skip
    # The code of the launch and nothing of the login node's or of the home's, even where the image sets PYTHONPATH.
    wanted = {"PYTHONPATH": str(CODE), "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    assert exports(text).items() >= {**wanted, **{f"APPTAINERENV_{k}": v for k, v in wanted.items()}}.items()


def test_with_pyxis_srun_makes_the_container_and_the_batch_script_gets_into_it_by_srun(tmp_path):
    container = Pyxis(image="/shared/x.sqsh", mounts=("/shared:/shared", "/scratch:/scratch"))
    text = script(SlurmCluster(container=container), "tokenizer", job(), tmp_path)
    inside = [
        "--container-image=/shared/x.sqsh",
        "--container-mounts=/shared:/shared,/scratch:/scratch",
        f"--container-workdir={Path.cwd()}",
        "--container-env=PYTHONPATH,PYTHONSAFEPATH,PYTHONNOUSERSITE",
    ]
    words = srun(text)
    assert words[-5:] == ["python3", "-u", "-m", "submitit.core._submit", str(tmp_path)]
    assert words[-9:-5] == inside
    (after,) = [line for line in text.splitlines() if line.startswith("source ")]
    assert shlex.split(after)[3:] == [
        "srun", "--nodes=1", "--ntasks=1", *inside, "python3", "-m", "launcher.slurm.after", "/run", "job",
    ]  # fmt: skip
    assert exports(text).items() >= {"PYTHONPATH": str(CODE), "PYTHONSAFEPATH": "1"}.items()
