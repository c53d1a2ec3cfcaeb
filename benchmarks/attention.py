"""How fast block-causal attention is, forward and backward, by every backend that can compute it here.

    .venv/bin/python -m benchmarks.attention [--tokens N...] [--blocks B...] [--widths D...] [--out FILE]

Beside it stand PyTorch's attention under a dense mask of the same, and token-causal attention, which has a kernel of
its own everywhere. Sides take turns in one run after a warm-up; a time is the median of its turns, a ratio the median
of the turns' ratios. TFLOP/s are of useful work: two products forward and four backward over the pairs that see each
other, scores that a kernel computes again not among them. fp32 and 2 threads on a CPU, bf16 on CUDA. Prints markdown,
and writes it to FILE. Needs torch and this repository alone. Timings mean something only where nothing else runs.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.attention.attention import attention
from stpredict.attention.backends import BACKENDS, Call, choose, refusal
from stpredict.attention.masks import BlockCausal, Causal, Mask, pairs, simplest
from stpredict.attention.reference import dense_mask

HEADS = 16
DENSE, CAUSAL = "dense mask", "token-causal"
# Wanted, of a forward and a backward pass: on a CPU times the dense mask's speed at 1,280 tokens, by block; on CUDA the
# share of token-causal attention's TFLOP/s.
WANTED_CPU, WANTED_CUDA = {256: 1.5, 16: 1.1}, 0.85

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Turn = tuple[float, float]  # seconds forward and backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1280, 5120])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128], help="of a head")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"# Attention\n\n`python -m benchmarks.attention`: {machine(arguments.device)}.")
    wanted: list[str] = []
    for tokens in arguments.tokens:
        batch = 1 if arguments.device == "cpu" else max(1, 10240 // tokens)
        say(f"\n## {tokens:,} tokens, batch {batch}, {HEADS} heads\n")
        say("| block | head | | forward ms | backward ms | TFLOP/s | times dense mask | of token-causal |")
        say("|---|---|---|---|---|---|---|---|")
        for block in arguments.blocks:
            for width in arguments.widths:
                wanted += compare(arguments, batch, tokens, block, width, say)
    if wanted:
        say("\n| wanted of `auto` | found |\n|---|---|")
    for line in wanted:
        say(line)
    say(f"\nLoad average afterwards {os.getloadavg()[0]:.1f}.")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


def compare(
    arguments: argparse.Namespace, batch: int, tokens: int, block: int, width: int, say: Callable[[str], None]
) -> list[str]:
    """Says a row for each side; returns what was wanted here, and found."""
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (batch, HEADS, tokens, width)
    q, k, v, gradient = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    mask = BlockCausal(block)
    call = Call.of(q.requires_grad_(), k, v, simplest(mask, tokens, tokens))
    auto = choose("auto", call)
    dense = dense_mask(mask, tokens).to(device)
    sides: dict[str, tuple[Mask, Attend]] = {
        DENSE: (mask, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)),
        CAUSAL: (Causal(), lambda q, k, v: attention(q, k, v, Causal())),
    }
    for backend in BACKENDS:
        if reason := refusal(backend, call):
            say(f"| {block} | {width} | {backend} | {reason} | | | | |")
        else:
            sides[backend] = mask, lambda q, k, v, backend=backend: attention(q, k, v, mask, backend)
    turns = in_turns({name: attend for name, (_, attend) in sides.items()}, (q, k, v), gradient, arguments.rounds)
    flops = {name: 3 * 4 * batch * HEADS * width * pairs(seen, tokens, tokens) for name, (seen, _) in sides.items()}
    speed = {name: [flops[name] / sum(turn) for turn in turns[name]] for name in turns}  # FLOP/s, by round
    ratios = {}
    for name in turns:
        faster = median(sum(a) / sum(b) for a, b in zip(turns[DENSE], turns[name], strict=True))
        of_causal = median(a / b for a, b in zip(speed[name], speed[CAUSAL], strict=True))
        ratios[name] = faster, of_causal
        forward, backward = (1e3 * median(part) for part in zip(*turns[name], strict=True))
        shown = f"**{name}**" if name == auto else name
        say(
            f"| {block} | {width} | {shown} | {forward:.3g} | {backward:.3g} | {median(speed[name]) / 1e12:.3g} "
            f"| {'' if name == CAUSAL else f'{faster:.2f}'} | {'' if name == CAUSAL else f'{of_causal:.2f}'} |"
        )
    faster, of_causal = ratios[auto]
    what = f"{tokens:,} tokens, block {block}, head {width}"
    if device.type == "cuda":
        return [f"| {what}: at least {WANTED_CUDA} of token-causal's TFLOP/s | {of_causal:.2f} by {auto} |"]
    if tokens == 1280 and block in WANTED_CPU:
        return [f"| {what}: at least {WANTED_CPU[block]} times the dense mask's speed | {faster:.2f} by {auto} |"]
    return []


def in_turns(
    sides: dict[str, Attend], inputs: tuple[Tensor, ...], gradient: Tensor, rounds: int
) -> dict[str, list[Turn]]:
    """Each side's turns: one after the other, round after round."""
    for attend in sides.values():
        for _ in range(2):
            turn(attend, inputs, gradient)
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, attend in sides.items():
            turns[name].append(turn(attend, inputs, gradient))
    return turns


def turn(attend: Attend, inputs: tuple[Tensor, ...], gradient: Tensor) -> Turn:
    """Of a pass; on CUDA the mean of several, which hide that the CPU launches them."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    cuda = gradient.is_cuda
    passes = 10 if cuda else 1

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    for _ in range(passes):
        out = attend(*inputs)
    between = now()
    for _ in range(passes):
        torch.autograd.grad(out, inputs, gradient, retain_graph=cuda)
    return (between - start) / passes, (now() - between) / passes


def machine(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{date.today()}, {where}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"load average {os.getloadavg()[0]:.1f} before"
    )


if __name__ == "__main__":
    main()
