"""What SVQ costs a training step: without it, as it is computed here, and as published, with its K weights written out.

    .venv/bin/python -m benchmarks.svq_memory [--batch N] [--timed-batch N] [--rounds N]

SimVP with gSTA on WeatherBench-S t2m (12 frames of 32x64 to 12, 16x32 locations with 32 channels; K = 10,000), fp32,
MAE, Adam. A step is a forward, a backward and an update.

Memory is that of all live tensors, operator by operator (``estimates.live_bytes``): weights, gradients, Adam's moments,
and what the forward pass keeps; kernels' own workspaces are not in it. At --batch it is counted on tensors that have
shapes alone, so that nothing needs to fit; at --timed-batch on those and on real ones, which have to agree. Time is the
median of --rounds interleaved steps at --timed-batch, after one that warms up, and means something only where nothing
else runs. Prints markdown.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.engine import machine, timed
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.estimates.shapes import TaskOfShapes
from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.simvp import SimVP
from stpredict.quantizers.config import SvqConfig
from stpredict.quantizers.svq import Svq
from stpredict.training.flops import ShapesOnly, count_flops

T2M = {"channels": 1, "input_frames": 12, "output_frames": 12, "size": (32, 64), "hid_S": 32, "hid_T": 256}
DEPTHS = {"N_S": 2, "N_T": 8, "translator": {"kind": "gsta", "drop_path": 0.1}}
WANTED = 1.35


class WrittenOut(Svq):
    """SVQ as published: K weights for every location, which the backward pass needs again."""

    def forward(self, latents: Tensor) -> tuple[Tensor, None]:
        h = self.mlp(rearrange(latents, "b t c h w -> b t h w c"))
        weights = F.linear(h, self.codes.weight, self.codes.bias)
        return rearrange(weights @ self.codebook, "b t h w c -> b t c h w"), None


def without() -> SimVP:
    return SimVP(SimVPConfig(**T2M, **DEPTHS))


def with_svq() -> SimVP:
    return SimVP(SimVPConfig(**T2M, **DEPTHS, quantizer=SvqConfig(init="normal")))


def written_out() -> SimVP:
    model = with_svq()
    model.quantizer.__class__ = WrittenOut
    return model


SIDES: dict[str, Callable[[], SimVP]] = {"without SVQ": without, "SVQ": with_svq, "SVQ written out": written_out}


class Step:
    """Of a model on made-up frames, always the same."""

    def __init__(self, model: SimVP, batch: int):
        self.model = model.train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.given, self.truth = (torch.rand(batch, 1, 12, *T2M["size"], device="cpu") for _ in range(2))

    def take(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.l1_loss(self.model(self.given).frames, self.truth)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--timed-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{machine()}, {torch.get_num_threads()} threads\n")
    memory(arguments.batch, arguments.timed_batch)
    time(arguments.timed_batch, arguments.rounds)
    print(f"\nLoad average afterwards {os.getloadavg()[0]:.1f}.")


def memory(batch: int, small: int) -> None:
    print("| | parameters | GMACs of a forward pass of one sample ", end="")
    print(f"| peak MB, batch {batch} | times without | peak MB, batch {small} | of real tensors |")
    print("|---|---|---|---|---|---|---|")
    first = 0
    for name, build in SIDES.items():
        peak = peak_bytes(build, batch, shapes=True)
        first = first or peak
        model = build()
        parameters = sum(p.numel() for p in model.parameters())
        macs = count_flops(ShapesOnly(model), (torch.empty(1, 1, 12, *T2M["size"]),), {}) / 2
        cells = [name, f"{parameters:,}", f"{macs / 1e9:.3f}", f"{peak / 1e6:,.0f}", f"**{peak / first:.2f}**"]
        cells += [f"{peak_bytes(build, small, shapes=shapes) / 1e6:,.0f}" for shapes in (True, False)]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nWanted: SVQ at most {WANTED} times without it, at batch 16.")


def peak_bytes(build: Callable[[], SimVP], batch: int, shapes: bool) -> int:
    """Of the second step: from then on Adam has its moments."""
    with torch.device("meta" if shapes else "cpu"):
        model = build()
    entered = nullcontext()
    if shapes:
        task = TaskOfShapes(SimpleNamespace(model=model, discriminator=None, networks=tuple), torch.float32)
        model, entered = task.task.model, task.entered()
    weights = [*model.parameters(), *model.buffers()]
    live = LiveBytes()
    live.ignore(weights)
    with entered, live:
        step = Step(model, batch)
        step.take()
        live.peak = live.bytes
        step.take()
    return live.peak + sum(tensor.nbytes for tensor in weights)


def time(batch: int, rounds: int) -> None:
    steps = {}
    for name, build in SIDES.items():
        torch.manual_seed(0)
        steps[name] = Step(build(), batch)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            taken = timed(lambda step=step, name=name: losses[name].append(step.take().item()), torch.device("cpu"))
            if turn:
                seconds[name].append(taken)
    first = median(seconds["without SVQ"])
    print(f"\n| | step s, batch {batch} | times without | loss of the steps |")
    print("|---|---|---|---|")
    for name, took in seconds.items():
        said = " ".join(f"{loss:.5f}" for loss in losses[name])
        print(f"| {name} | {median(took):.2f} | **{median(took) / first:.2f}** | {said} |")


if __name__ == "__main__":
    main()
