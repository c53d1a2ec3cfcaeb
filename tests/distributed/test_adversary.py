"""Adversarial training in one, two and three processes at every ZeRO stage, against plain PyTorch in one process."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stpredict.run import Run
from stpredict.training.config import TrainingConfig
from stpredict.training.schedule import learning_rate_factor
from tests.distributed.adversarial_toy import R1, Discriminator, Model
from tests.distributed.test_engine import assert_same_bits, whole_state
from tests.distributed.toy import repeatable, run_ranks, stack

STEPS, MICRO, MICROS = 20, 6, 2  # samples of a micro-batch over all ranks, and micro-batches of a step
STAGES = (0, 1, 2, 3)
SGD = {"kind": "sgd", "lr": 0.1}
ADAM = {"kind": "adam", "lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4}
WITHIN = {"sgd": 1e-6, "adam": 1e-5}
#: How the discriminator is trained, and what the task makes of it.
HOW = {
    "hinge": ({"start": 3, "every": 2}, {"loss": "hinge", "lecam": 0.5, "r1_every": 2}),
    "non_saturating": ({"start": 4, "model_every": 3}, {"loss": "non_saturating", "lecam": 0.1, "r1_every": 1}),
    "adaptive": ({"start": 2, "adaptive_weight": True}, {"loss": "hinge", "lecam": 0.5, "r1_every": 3}),
    "adaptive_non_saturating": ({"model_every": 2, "adaptive_weight": True}, {"loss": "non_saturating"}),
}
OPTIMIZERS = {"sgd": SGD, "adam": ADAM}
#: Steps that are skipped: one at which both would learn, one of the discriminator alone, and the first one judged, by
#: which the adaptive weight tells the last layer's output.
SKIPPED = {"hinge": 10, "non_saturating": 10, "adaptive": 2}
EMA = 0.9
#: How far weights of the model, and of the discriminator, whose training is in fp32, may be from those in fp32.
ROUNDED = {"bf16": (2e-3, 1e-4), "fp16": (3e-4, 2e-5)}
LOW = [("bf16", 0), ("bf16", 1), ("bf16", 3), ("fp16", 0), ("fp16", 2), ("fp16", 3)]
#: The same training, computed in another way.
OTHERWISE = {
    "recomputed": {"activation_checkpointing": {"policy": "layers"}},
    "gathered": {"deepspeed": {"zero_optimization": {"param_persistence_threshold": 0}}},
}
TERMS = {"loss", "l2", "effort", "deceived", "adaptive_weight", "real", "fake", "logit_real", "logit_fake"}
TERMS |= {"lecam_real", "lecam_fake", "r1", "grad_norm", "lr", "discriminator_lr"}
CASES = [(how, kind, 2) for how in HOW for kind in OPTIMIZERS]
CASES += [(how, "sgd", ranks) for how in ("hinge", "adaptive") for ranks in (1, 3)]


def trial(name: str, how: str, optimizer: dict, ranks: int, stage: int, **changes) -> dict:
    discriminator, task = HOW[how]
    training = {
        "steps": STEPS,
        "batch_size": MICRO * MICROS,
        "micro_batch_size": MICRO // ranks,
        "precision": "fp32",
        "zero_stage": stage,
        "clip_norm": 1.0 if how == "hinge" else None,
        "optimizer": optimizer,
        "discriminator": {"optimizer": {**optimizer, "lr": optimizer["lr"] / 2}, **discriminator},
        "ema_decay": EMA,
        "compile": False,
        "schedule": {"kind": "linear", "warmup_steps": 2, "final": 0.5},
        "log_every": 1,
        "validate_every": STEPS,
        "picture_every": STEPS,
        "checkpoint": {"every": STEPS},
    }
    training |= changes.pop("training", {})
    return {"run": name, "training": training, "adversarial": task, **changes}


def plain(
    how: str, optimizer: dict, skipped: int | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The same training written out: weights, their averages and LeCam's after it, and what each step would log. Nobody
    learns from step ``skipped``."""
    settings, task = HOW[how]
    training = TrainingConfig.model_validate(trial("", how, optimizer, 1, 0)["training"])
    torch.manual_seed(0)
    model, judge = Model(), Discriminator()
    network = judge.network
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer["kind"]]
    arguments = {name: value for name, value in optimizer.items() if name != "kind"}
    ours, theirs = kind(model.parameters(), **arguments), kind(network.parameters(), **arguments)
    averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    real_average = fake_average = 0.0
    updates, rows = 0, []
    for step in range(STEPS):
        if step == skipped:
            continue
        factor = learning_rate_factor(training.schedule, step, STEPS)
        ours.param_groups[0]["lr"], theirs.param_groups[0]["lr"] = (
            optimizer["lr"] * factor,
            optimizer["lr"] / 2 * factor,
        )
        batch = stack(list(range(step * MICRO * MICROS, (step + 1) * MICRO * MICROS)))
        y, mask = batch["y"], batch["mask"]
        since = step - settings.get("start", 0) + 1
        row, made_all = {}, []
        ours.zero_grad()
        learns = since < 1 or since % settings.get("model_every", 1) == 0
        l2, effort, deceived, factors = 0.0, 0.0, 0.0, []
        for one in range(MICROS):
            part = slice(one * MICRO, (one + 1) * MICRO)
            output = model(batch["x"][part])
            made_all.append(output["made"].detach())
            rec = ((output["made"] - y[part]) * mask[part]).square().sum() / mask.sum()
            small = output["effort"].sum() / len(y)
            l2, effort = l2 + rec.item(), effort + small.item()
            loss = rec + 0.05 * small
            if learns and since >= 1:
                logits = network(output["made"])
                values = -logits if task["loss"] == "hinge" else -F.logsigmoid(logits)
                adversarial = (values * mask[part]).sum() / mask.sum()
                deceived, weight = deceived + adversarial.item(), 0.5
                if settings.get("adaptive_weight"):
                    last = model.last.weight
                    by_rec = torch.autograd.grad(loss, last, retain_graph=True)[0].norm() * MICROS
                    by_adversarial = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm() * MICROS
                    factors.append((by_rec / (by_adversarial + 1e-4)).clamp(0, 1e4).item())
                    weight *= factors[-1]
                loss = loss + weight * adversarial
            if learns:
                loss.backward()
        row |= {"loss": l2 + 0.05 * effort, "l2": l2, "effort": effort}
        if learns:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or float("inf"))
            row["grad_norm"] = norm.item()
            ours.step()
            for name, value in model.named_parameters():
                averages[name] = EMA * averages[name] + (1 - EMA) * value.detach()
        if learns and since >= 1:
            row["deceived"] = deceived
        if factors:
            row["adaptive_weight"] = sum(factors) / MICROS
        if since >= 1 and since % settings.get("every", 1) == 0:
            made = torch.cat(made_all)
            y = y.clone().requires_grad_()
            real, fake = network(y), network(made)
            if task["loss"] == "hinge":
                of_real, of_fake = (1 - real).clamp(min=0), (1 + fake).clamp(min=0)
            else:
                of_real, of_fake = -F.logsigmoid(real), -F.logsigmoid(-fake)
            terms = {"real": of_real.mean(), "fake": (of_fake * mask).sum() / mask.sum()}
            loss = terms["real"] + terms["fake"]
            if task.get("lecam"):
                terms |= {"lecam_real": torch.zeros(()), "lecam_fake": torch.zeros(())}
                if updates:
                    anchors = [average / (1 - 0.9**updates) for average in (real_average, fake_average)]
                    terms["lecam_real"] = (real - anchors[1]).clamp(min=0).square().mean()
                    terms["lecam_fake"] = ((anchors[0] - fake).clamp(min=0).square() * mask).sum() / mask.sum()
                loss = loss + task["lecam"] * (terms["lecam_real"] + terms["lecam_fake"])
            turn = since // settings.get("every", 1) - 1
            if task.get("r1_every") and turn % task["r1_every"] == 0:
                gradient = torch.autograd.grad(real.sum(), y, create_graph=True)[0]
                terms["r1"] = gradient.square().sum(1).mean()
                loss = loss + task["r1_every"] * R1 / 2 * terms["r1"]
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            terms |= {"logit_real": real.mean(), "logit_fake": (fake * mask).sum() / mask.sum()}
            row |= {name: value.item() for name, value in terms.items()}
            row["discriminator_lr"] = theirs.param_groups[0]["lr"]
            real_average = 0.9 * real_average + 0.1 * row["logit_real"]
            fake_average = 0.9 * fake_average + 0.1 * row["logit_fake"]
            updates += 1
        row |= {"lr": ours.param_groups[0]["lr"]}
        rows.append(row)
    found = {f"model/weight/{name}": value for name, value in model.named_parameters()}
    found |= {f"model/ema/{name}": value for name, value in averages.items()}
    found |= {f"discriminator/weight/network.{name}": value for name, value in network.named_parameters()}
    found["discriminator/buffer/lecam.averages"] = torch.tensor([real_average, fake_average])
    found["discriminator/buffer/lecam.total"] = torch.tensor(1 - 0.9**updates)
    return {name: value.detach() for name, value in found.items()}, rows


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    return {(how, kind): plain(how, optimizer) for how in HOW for kind, optimizer in OPTIMIZERS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """Every case at every stage, in one, two and three ranks, each number started once."""
    out = {}
    for ranks in (1, 2, 3):
        cases = [(how, kind, stage) for how, kind, of in CASES if of == ranks for stage in STAGES]
        trials = [trial("_".join(map(str, case)), case[0], OPTIMIZERS[case[1]], ranks, case[2]) for case in cases]
        if ranks == 2:
            for how, step in SKIPPED.items():
                poison = {step * MICRO * MICROS + 3: "nan"}
                trials += [trial(f"skipped_{how}_{stage}", how, SGD, ranks, stage, poison=poison) for stage in (0, 2)]
            for precision, stage in LOW:
                settings = {"precision": precision}
                trials.append(trial(f"rounded_{precision}_{stage}", "adaptive", SGD, ranks, stage, training=settings))
            for name, settings in OTHERWISE.items():
                trials.append(trial(name, "adaptive", SGD, ranks, 3, training=settings))
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        out[ranks] = folder, run_ranks(trials, folder, ranks, timeout_s=400)
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("how", "kind", "ranks"), CASES)
def test_model_discriminator_and_averages_equal_plain_pytorch(runs, references, how, kind, stage, ranks):
    state = whole_state(Run(runs[ranks][0] / f"{how}_{kind}_{stage}"))
    expected, _ = references[how, kind]
    for name, value in expected.items():
        assert state[name].shape == value.shape
        assert (state[name] - value).abs().max() <= WITHIN[kind], name
    assert ("model/exp_avg/last.weight" in state) == (kind == "adam")


@pytest.mark.parametrize("name", OTHERWISE)
def test_so_they_do_where_layers_are_recomputed_or_gathered_anew(runs, references, name):
    state = whole_state(Run(runs[2][0] / name))
    for key, value in references["adaptive", "sgd"][0].items():
        assert (state[key] - value).abs().max() <= WITHIN["sgd"], key


@pytest.mark.parametrize(("precision", "stage"), LOW)
def test_in_lower_precision_they_are_equal_but_for_its_rounding(runs, references, precision, stage):
    run = Run(runs[2][0] / f"rounded_{precision}_{stage}")
    state, (expected, rows) = whole_state(run), references["adaptive", "sgd"]
    for key, value in expected.items():
        assert (state[key] - value).abs().max() <= ROUNDED[precision][key.startswith("discriminator")], key
    logged = [row["adaptive_weight"] for row in run.metrics() if "adaptive_weight" in row]
    assert logged == pytest.approx([row["adaptive_weight"] for row in rows if "adaptive_weight" in row], rel=0.02)


@pytest.mark.parametrize(("how", "kind", "ranks"), CASES)
def test_every_step_logs_the_terms_that_it_computed_and_their_means(runs, references, how, kind, ranks):
    _, expected = references[how, kind]
    for stage in STAGES:
        rows = [row for row in Run(runs[ranks][0] / f"{how}_{kind}_{stage}").metrics() if row["split"] == "train"]
        assert len(rows) == STEPS
        for row, others in zip(rows, expected, strict=True):
            row, others = ({k: v for k, v in values.items() if k in TERMS} for values in (row, others))
            assert row == pytest.approx(others, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_lecams_averages_are_the_same_on_every_rank(runs, ranks):
    assert [found["unequal"] for found in runs[ranks][1]] == [[]] * len(runs[ranks][1])


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("how", SKIPPED)
def test_of_a_skipped_step_the_discriminator_and_lecam_learn_nothing_either(runs, how, stage):
    state = whole_state(Run(runs[2][0] / f"skipped_{how}_{stage}"))
    for name, value in plain(how, SGD, skipped=SKIPPED[how])[0].items():
        assert (state[name] - value).abs().max() <= WITHIN["sgd"], name


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    cases = [("hinge", 2), ("hinge", 3), ("adaptive", 3), ("non_saturating", 2)]
    trials = []
    for how, stage in cases:
        for name, until in (("whole", None), ("resumed", 7), ("resumed", None)):
            changes = {"training": {"steps": 12, "zero_stage": stage}, "until": until}
            trials.append(trial(f"{how}_{stage}_{name}", how, ADAM, 2, stage, **changes))
    found = run_ranks(trials, tmp_path, 2)
    assert [one["step"] for one in found] == [12, 7, 12] * len(cases)
    for how, stage in cases:
        runs = [Run(tmp_path / f"{how}_{stage}_{name}") for name in ("whole", "resumed")]
        assert whole_state(runs[0])["discriminator/buffer/lecam.averages"].all()
        assert_same_bits(*map(whole_state, runs))
        rows = [[repeatable(row) for row in run.metrics()] for run in runs]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("last_layer", "what came out is not among what it returned"),
        ("parameter", r"a loss depends on a tensor of shape \(16,\) that needs a gradient and is no output"),
    ],
)
def test_what_the_adaptive_weight_cannot_do_is_refused(tmp_path, fault, message):
    refused = trial("run", "adaptive", SGD, 1, 0)
    refused["adversarial"] = {**refused["adversarial"], "fault": fault}
    with pytest.raises(AssertionError, match=message):
        run_ranks([copy.deepcopy(refused)], tmp_path, 1)
