"""Frames per second of NBP decoding by block shape, beside a bound from bare linear layers.

    .venv/bin/python -m benchmarks.decoding [--batches 1 16] [--rounds N] [--precision P] [--whole]

Priors of one size with random weights, K600's shape: 5x16x16 tokens of 64,000 codes, of which 2 latent frames are given
and 12 frames predicted; keys and values cached, top-k 16,000 and top-p 0.9. On a CPU the prior has 183 M parameters (12
layers of width 768) and the tokenizer a quarter of the published widths; on CUDA they are NBP-XL and the published
tokenizer, and steps are replayed graphs. --layers, --width, --heads, --mlp-width and --tokenizer-width change that.

Block shapes take turns. --whole (the default on CUDA) times whole decodings of ``continue_tokens``. Without it, a
decoding is the given frames' forward plus steps that are timed at ``LENGTHS`` lengths of the caches, evenly spread:
their mean, which is exact where time grows linearly with the length, times the number of steps. Whole decodings are
run once beside it, at the first batch size. Medians of --rounds, of half as many at the other batch sizes, and of two
for the given frames' forward.

The bound applies all matrices of the model, and nothing else, to the rows of a step: what decoding would take if
attention, norms, sampling and Python cost nothing. Prints markdown; timings mean something only where nothing else
runs.
"""

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine import machine, timed
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw_tokens, uniform_numbers
from stpredict.sampling.next_block import continue_tokens, forward_steps
from stpredict.sampling.recording import Recording
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.precision import TYPES, cpu_bf16_is_real

BLOCKS = [(1, 1, 1), (1, 1, 16), (1, 4, 4), (1, 16, 16)]
GRID, GIVEN = (5, 16, 16), 2
FRAMES, GIVEN_FRAMES, SIDE = 17, 5, 128
SAMPLING = SamplingConfig(temperature=1.0, top_k=16_000, top_p=0.9)
LENGTHS = 4  # of the caches, at which steps are timed


@dataclass
class Case:
    """A block shape at a batch size, and its seconds."""

    prior: NextBlockPrior
    batch: int
    given: Tensor  # (batch, GIVEN, 16, 16)
    recording: Recording | None  # of whole decodings, on CUDA
    caches: list
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def rows(self) -> int:
        return self.batch * self.prior.order.block_tokens

    @property
    def steps(self) -> int:
        """Forward passes of a decoding, that of the given frames among them."""
        return forward_steps(self.prior, GIVEN)

    def lengths(self) -> list[int]:
        """Of the caches before the steps that are timed."""
        steps, count = self.steps - 1, min(LENGTHS, self.steps - 1)
        first, size = self.given[0].numel(), self.prior.order.block_tokens
        return [first + size * int((i + 0.5) * steps / count) for i in range(count)]

    def median(self, part: str) -> float:
        return median(self.seconds[part])

    def step(self) -> float:
        """Seconds of one, on average: of whole decodings, or of those that were timed."""
        if "whole" in self.seconds:
            return (self.median("whole") - self.median("prompt")) / (self.steps - 1)
        return mean(self.median(f"step at {length}") for length in self.lengths())

    def bare_step(self) -> float:
        return self.median("bare layers") + self.median("bare head")

    def stepping(self) -> tuple[float, float]:
        """Seconds of all steps after the given frames' forward, and the bound."""
        return (self.steps - 1) * self.step(), (self.steps - 1) * self.bare_step()

    def bare_prompt(self) -> float:
        """The head is needed for the last block alone."""
        return self.median("bare layers of prompt") + self.median("bare head")

    def decoding(self) -> tuple[float, float]:
        """Seconds from given tokens to all tokens, and the bound."""
        steps, bound = self.stepping()
        return self.median("prompt") + steps, self.bare_prompt() + bound


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 where it is real, else fp32")
    parser.add_argument("--whole", action="store_true", default=cuda)
    parser.add_argument("--layers", type=int, default=24 if cuda else 12)
    parser.add_argument("--width", type=int, default=1536 if cuda else 768)
    parser.add_argument("--heads", type=int, default=16 if cuda else 12)
    parser.add_argument("--mlp-width", type=int, default=4096 if cuda else 2048)
    parser.add_argument("--tokenizer-width", type=int, default=128 if cuda else 32)
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16" if cuda or cpu_bf16_is_real() else "fp32")
    device = torch.device("cuda" if cuda else "cpu")
    priors = priors_of(arguments, device)
    parameters, width = sum(p.numel() for p in priors[0].parameters()) / 1e6, arguments.tokenizer_width
    print(f"{machine()}, {torch.get_num_threads()} threads\n")
    print(f"Priors of {parameters:.0f} M parameters and a tokenizer of width {width}, random weights, ", end="")
    print(f"{arguments.precision}.", flush=True)
    for batch in arguments.batches:
        cases = [case(prior, batch, device) for prior in priors]
        report(cases, measure(cases, arguments, device, first=batch == arguments.batches[0]))


def priors_of(arguments: argparse.Namespace, device: torch.device) -> list[NextBlockPrior]:
    """One for each block shape, with the same weights at the same place."""
    torch.manual_seed(0)
    sizes = {name: getattr(arguments, name) for name in ("layers", "width", "heads", "mlp_width")}
    priors = []
    for block in BLOCKS:
        with torch.device("meta" if priors else device):
            prior = NextBlockPrior(NextBlockConfig(block=block, **sizes), 64_000, GRID).to(TYPES[arguments.precision])
        if priors:
            prior.load_state_dict(priors[0].state_dict(), assign=True)
        priors.append(prior.to(device).eval())
    return priors


def case(prior: NextBlockPrior, batch: int, device: torch.device) -> Case:
    given = torch.randint(prior.codebook_size, (batch, GIVEN, *GRID[1:]), generator=torch.Generator().manual_seed(0))
    caches = prior.make_caches(batch)
    for cache in caches:
        cache.keys.fill_(0.1)
        cache.values.fill_(0.1)
    return Case(prior, batch, given.to(device), Recording() if device.type == "cuda" else None, caches)


@torch.no_grad()
def measure(cases: list[Case], arguments: argparse.Namespace, device: torch.device, first: bool) -> float:
    """Fills the cases' seconds. Returns those of the tokenizer: encoding the given frames and decoding all of them."""
    for turn in range(-1, arguments.rounds if first else (arguments.rounds + 1) // 2):
        for c in cases:
            time_parts(c, device, prompt=turn < 2, steps=not arguments.whole)
            if arguments.whole:
                for _ in range(2 if turn < 0 else 1):  # the second one records
                    c.seconds["whole"].append(timed(lambda c=c: decode(c), device))
        if turn < 2:
            seconds = timed(lambda: matrices(cases[0].prior.layers, cases[0].given.numel()), device)
            for c in cases:
                c.seconds["bare layers of prompt"].append(seconds)
        if turn < 0:  # it has warmed up
            for c in cases:
                c.seconds.clear()
    for c in cases if first and not arguments.whole else []:
        c.seconds["at once"].append(timed(lambda c=c: decode(c), device))
    return tokenizer_seconds(arguments, cases[0].batch, device)


def time_parts(c: Case, device: torch.device, prompt: bool, steps: bool) -> None:
    size, given = c.prior.order.block_tokens, c.given[0].numel()
    uniform = uniform_numbers(range(c.batch), size, device)
    sequence = torch.randint(c.prior.codebook_size, (c.batch, c.prior.order.tokens), device=device)

    def step(done: int, new: int) -> float:
        for cache in c.caches:
            cache.length = done
        ids = sequence[:, done : done + new]
        return timed(lambda: draw_tokens(c.prior(ids, caches=c.caches), SAMPLING, uniform), device)

    if prompt:
        c.seconds["prompt"].append(step(0, given))
    for length in c.lengths() if steps else []:
        c.seconds[f"step at {length}"].append(step(length, size))
    c.seconds["bare layers"].append(timed(lambda: matrices(c.prior.layers, c.rows), device))
    c.seconds["bare head"].append(timed(lambda: matrices(c.prior.head, c.rows), device))


def matrices(module: nn.Module, rows: int) -> None:
    """All of the module's, each applied to ``rows``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            F.linear(layer.weight.new_ones(rows, layer.in_features), layer.weight)


def decode(c: Case) -> None:
    continue_tokens(c.prior, c.given, SAMPLING, range(c.batch), recording=c.recording)


def tokenizer_seconds(arguments: argparse.Namespace, batch: int, device: torch.device) -> float:
    """For the whole batch. A CPU is busy with one clip and takes 16 times as long for 16, which is not timed."""
    width, clips = arguments.tokenizer_width, batch if device.type == "cuda" else 1
    tokenizer = CausalCnnTokenizer(CausalCnnConfig(channels=(width, 2 * width, 2 * width, 4 * width)))
    tokenizer = tokenizer.to(device, TYPES[arguments.precision]).eval()
    video = torch.rand(clips, 3, GIVEN_FRAMES, SIDE, SIDE, device=device) * 2 - 1
    ids = torch.randint(tokenizer.config.codebook_size, (clips, *GRID), device=device)
    seconds = [timed(lambda: (tokenizer.encode(video), tokenizer.decode(ids)), device) for _ in range(3)]
    return median(seconds[1:]) * batch / clips


def report(cases: list[Case], tokenizing: float) -> None:
    batch, first = cases[0].batch, cases[0]
    frames = batch * (FRAMES - GIVEN_FRAMES)
    print(f"\n### Batch {batch}\n")
    print("| block | forward steps | ms a step | of bare matrices | steps: times 1x1x1 | bound | of bound |")
    print("|---|---|---|---|---|---|---|")
    for c in cases:
        (steps, bare_steps), (first_steps, first_bare_steps) = c.stepping(), first.stepping()
        times, bound = first_steps / steps, first_bare_steps / bare_steps
        cells = [shape(c), c.steps, f"{1e3 * c.step():.2f}", f"{1e3 * c.bare_step():.2f}"]
        print(f"| {' | '.join(map(str, cells))} | **{times:.2f}** | {bound:.2f} | {times / bound:.2f} |")
    print("\n| block | given frames ms | of bare matrices | decoding s | run at once s ", end="")
    print("| frames/s | times 1x1x1 | bound | frames/s with tokenizer | times 1x1x1 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for c in cases:
        (decoding, bare), (first_decoding, first_bare) = c.decoding(), first.decoding()
        cells = [shape(c), f"{1e3 * c.median('prompt'):.0f}", f"{1e3 * c.bare_prompt():.0f}", f"{decoding:.2f}"]
        cells += [f"{c.median('at once'):.2f}" if "at once" in c.seconds else "", f"{frames / decoding:.2f}"]
        cells += [f"**{first_decoding / decoding:.2f}**", f"{first_bare / bare:.2f}"]
        cells += [f"{frames / (decoding + tokenizing):.2f}"]
        cells += [f"{(first_decoding + tokenizing) / (decoding + tokenizing):.2f}"]
        print(f"| {' | '.join(cells)} |")
    load = os.getloadavg()[0]
    print(f"\nThe tokenizer takes {tokenizing:.2f} s a batch. Load average {load:.1f}.", flush=True)


def shape(c: Case) -> str:
    return "x".join(map(str, c.prior.order.block))


if __name__ == "__main__":
    main()
