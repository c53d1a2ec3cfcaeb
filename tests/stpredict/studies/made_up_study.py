"""Run directories of a study as its trainings leave them, of losses that follow a known law: nothing is trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from stpredict.evaluation.forecast_scores import Difference, ForecastEvaluation, MethodScores, Values
from stpredict.evaluation.generated import Speed
from stpredict.evaluation.results import Evaluation, PerFrame, Scores, TokenizerScores
from stpredict.jobs.config import StudyReportConfig
from stpredict.run import Run
from stpredict.studies.config import Role

E, A, ALPHA, B, BETA = 1.7, 40.0, 0.32, 90.0, 0.35
TOKENS, STEPS, EVERY = 4096, 400, 25
STARTED = "2026-11-21T10:00:00+00:00"


def loss_of(parameters: float, tokens: float) -> float:
    """L(N, D) = E + A N^-alpha + B D^-beta."""
    return E + A * parameters**-ALPHA + B * tokens**-BETA


def write_training(
    path: Path,
    parameters: int,
    lr: float = 1e-3,
    penalty: float = 0.0,
    state: str = "done",
    steps: int = STEPS,
    until: int | None = None,
    diverges: int | None = None,
    block: tuple[int, ...] = (1, 1, 8),
    tokens: int = TOKENS,
    **status: str,
) -> Run:
    """``penalty``: of the loss; ``until``: the last step written; ``diverges``: the step from which losses
    grow; ``tokens``: of a step, 0 as of a forecaster."""
    run = Run(path)
    path.mkdir(parents=True)
    config = {"kind": "prior", "run": str(path), "resources": {"processes": 1}, "model": {"block": list(block)}}
    schedule = {"kind": "constant", "warmup_steps": EVERY}
    training = {"steps": steps, "batch_size": 8, "optimizer": {"lr": lr}, "schedule": schedule}
    run.write_config(yaml.safe_dump({**config, "training": training}))
    run.update_status(kind="prior", state=state, step=until or steps, steps=steps, started=STARTED, host="node7")
    if state == "done":
        run.update_status(finished="2026-11-21T10:04:00+00:00")
    if status:
        run.update_status(**status)
    scale = {"parameters": parameters, "embedding_parameters": parameters // 10, "tokens_per_step": tokens}
    run.scale_path.write_text(json.dumps({**scale, "flops_per_step": 6.0 * parameters * TOKENS}))
    rows = []
    for step in range(EVERY, (until or steps) + 1, EVERY):
        loss = loss_of(parameters, step * TOKENS) + penalty
        if diverges is not None and step > diverges:
            loss *= 1.6 ** ((step - diverges) / EVERY)
        memory = {"step_s": 0.5, "rss_gb": 1 + parameters / 1e7}
        rows.append({"step": step, "split": "train", "loss": loss, "cross_entropy": loss, **memory})
        rows.append({"step": step, "split": "val", "cross_entropy": loss})
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.environment_path.write_text(json.dumps({"git_commit": "abc123" * 7, "cpus": 2, "cpu": "A CPU"}))
    return run


def config_of(folder: Path, axes: Mapping[str, Role], trials: Mapping[str, Mapping], **keys) -> StudyReportConfig:
    """``trials``: name → its place; their training is FOLDER/NAME-prior."""
    found = {name: {"at": dict(at), "runs": {"prior": folder / f"{name}-prior"}} for name, at in trials.items()}
    keys = {"analysis": {"bootstrap": 0}, **keys}
    return StudyReportConfig(run=folder / "report", title="a study", axes=dict(axes), trials=found, **keys)


def write_sizes(folder: Path, sizes: Mapping[str, int], seeds: int = 2, **keys) -> StudyReportConfig:
    """A study of sizes (label → N) and seeds, all done. Seeds differ by a hundredth of the loss' law at most."""
    trials = {}
    for size, parameters in sizes.items():
        for seed in range(seeds):
            trials[f"{size}-seed{seed}"] = {"size": size, "seed": f"seed{seed}"}
            write_training(folder / f"{size}-seed{seed}-prior", parameters, penalty=0.01 * (seed - (seeds - 1) / 2))
    return config_of(folder, {"size": "size", "seed": "seed"}, trials, **keys)


def write_blocks(folder: Path, seconds: Mapping[str, float]) -> StudyReportConfig:
    """A study of block sizes (label blockTxHxW → seconds of sampling 240 frames), each with two seeds 0.2 apart, and
    with frames predicted and evaluated: a PSNR of 21 dB, one more than repeating."""
    trials = {}
    for block, took in seconds.items():
        for seed in (0, 1):
            name = f"{block}-seed{seed}"
            shape = tuple(map(int, block.removeprefix("block").split("x")))
            write_training(folder / f"{name}-prior", 100_000, penalty=0.2 * (seed - 0.5), block=shape)
            generated, evaluated = Run(folder / f"{name}-predictions"), Run(folder / f"{name}-evaluation")
            generated.update_status(kind="generate", state="done")
            evaluated.update_status(kind="evaluate", state="done")
            speed = Speed(
                clips=20, predicted_frames=240, batches=2, batch_size=10, forward_steps=4, sampling_s=took,
                whole_s=took + 1, device="CPU",
            )  # fmt: skip
            index = {"keys": ["a"], "given_frames": 5, "codebook_size": 8, "speed": speed.model_dump()}
            generated.samples.mkdir()
            (generated.samples / "index.json").write_text(json.dumps(index))
            (evaluated.path / "metrics.json").write_text(_evaluation(speed).model_dump_json())
            runs = {job: folder / f"{name}-{job}" for job in ("prior", "predictions", "evaluation")}
            trials[name] = {"at": {"block": block, "seed": f"seed{seed}"}, "runs": runs}
    return StudyReportConfig(run=folder / "report", axes={"block": "other", "seed": "seed"}, trials=trials)


def write_translators(folder: Path, rmse: Mapping[str, float]) -> StudyReportConfig:
    """A study of translators (label → RMSE of forecasts), each with two seeds 0.2 apart; persistence's is 3 K,
    climatology's 2 K, and MAEs are half of the RMSEs."""
    cells = {(translator,): value for translator, value in rmse.items()}
    return write_forecasters(folder, ["translator"], cells, [-0.1, 0.1])


def write_forecasters(
    folder: Path, axes: Sequence[str], rmse: Mapping[tuple[str, ...], float], seeds: Sequence[float]
) -> StudyReportConfig:
    """A study of forecasters at places on ``axes`` (labels → RMSE of forecasts), each with a seed for each of
    ``seeds``, what it adds to the RMSE, and a tenth of it to the loss; yardsticks as in ``write_translators``."""
    trials = {}
    for labels, middle in rmse.items():
        for seed, more in enumerate(seeds):
            name = "-".join([*labels, f"seed{seed}"])
            write_training(folder / f"{name}-prior", 100_000, penalty=more / 10, tokens=0)
            evaluated = Run(folder / f"{name}-evaluation")
            evaluated.update_status(kind="evaluate", state="done")
            methods = {"prediction": middle + more, "persistence": 3.0, "climatology": 2.0}
            evaluation = ForecastEvaluation(
                data="field", samples=9, input_frames=2, output_frames=2, channels=["t2m"], units=["K"],
                leads_h=[1, 2], headline="rmse", differences=[_against(method) for method in list(methods)[1:]],
                methods={method: _errors(value) for method, value in methods.items()},
            )  # fmt: skip
            (evaluated.path / "metrics.json").write_text(evaluation.model_dump_json())
            runs = {job: folder / f"{name}-{job}" for job in ("prior", "evaluation")}
            trials[name] = {"at": {**dict(zip(axes, labels, strict=True)), "seed": f"seed{seed}"}, "runs": runs}
    roles = {**dict.fromkeys(axes, "other"), "seed": "seed"}
    return StudyReportConfig(run=folder / "report", axes=roles, trials=trials)


def _errors(rmse: float) -> MethodScores:
    values = {"rmse": rmse, "mae": rmse / 2}
    return MethodScores(metrics={name: Values(overall=x, per_lead=[x, x]) for name, x in values.items()})


def _against(method: str) -> Difference:
    return Difference(other=method, metric="rmse", value=-1, stderr=0.1)


def _evaluation(speed: Speed) -> Evaluation:
    def scores(psnr: float) -> Scores:
        frames = PerFrame(psnr=[psnr] * 12, ssim=[psnr / 30] * 12, mse=[0.01] * 12)
        return Scores(psnr=psnr, ssim=psnr / 30, mse=0.01, per_frame=frames)

    tokenizer = {"psnr": 26, "constant_frame_psnr": 15, "gain_db": 11, "codes_used": 8, "codebook_size": 8}
    return Evaluation(
        clips=20,
        given_frames=5,
        predicted_frames=12,
        prior_step=STEPS,
        prediction=scores(21),
        repeat_last_frame=scores(20),
        reconstruction=scores(26),
        gain_over_repeat_db=1,
        gain_over_repeat_stderr_db=0.1,
        tokenizer=TokenizerScores(**tokenizer, codebook_perplexity=8, tokens=800),
        speed=speed,
    )
