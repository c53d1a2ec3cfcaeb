"""What the data pipeline costs: decoded clips, latents, the first batch, memory.

    .venv/bin/python -m benchmarks.data [--videos FOLDER] [--only decode …] [--quick]

Renders moving digits (and shards FOLDER) to a temporary folder, prints a markdown table per part. Sides of a comparison
take turns in one run after a warm-up; a number is the median of its turns, a ratio the median of the turns' ratios.

decode   clips/s of the stream against a bare loop over the same tars: WebDataset's iteration and ``decode_clip``. The
         bare loop has one process against ``workers: 0``, and two against ``workers: 2``. Beside it the same loop with
         PyAV alone, and with torchcodec where that is installed.
first    seconds to the first batch: at the beginning, deep in an epoch, deep in a late epoch; tars not in memory.
enter    the same in a set of 10,000 shards of 1,000 clips (one tar under 10,000 names).
memory   of main process and workers (PSS) over 20,000 clips, quarter by quarter.
latents  tokens/s read with one worker against what the demo prior learns from; bytes that tars add to them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import webdataset

from data_pipeline.clips import Plan, clip_indices, fit_frame
from data_pipeline.config import ClipConfig, ClipDataConfig, FolderSource, LatentDataConfig, MovingDigitsSource, Source
from data_pipeline.decode import EXTENSIONS, VideoInfo, decode_clip
from data_pipeline.formats import Latents
from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import Manifest, merge, write_manifest
from data_pipeline.order import Order, Share, stream_count
from data_pipeline.seeding import generator
from data_pipeline.shard_cache import ShardFiles
from data_pipeline.shard_set import read_set
from data_pipeline.shards import write_shards
from data_pipeline.stream import TrainingBatches, clip_batches, latent_batches
from data_pipeline.tar_shard import TarShard
from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig, ShardConfig
from stpredict.jobs.shard import plan
from stpredict.priors.next_block import NextBlockPrior

SEED = 0
CLIP = ClipConfig(frames=17, size=(64, 64))
SHARE = Share(rank=0, world_size=1, batch_size=16)
CLIP_COSTS = ("clips/s", "CPU ms/clip")
DEMO_GRID, DEMO_CODES = (9, 8, 8), 1024
NBP_GRID, NBP_CODES = (5, 16, 16), 64_000
PACKAGES = ("torch", "numpy", "webdataset", "decord", "av", "torchcodec")

Side = Callable[[], tuple[float, ...]]  # a number for each unit
Decode = Callable[[bytes, ClipConfig, np.random.Generator, VideoInfo], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of videos to decode, besides the digits")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="a minute in all: does it run? Its numbers mean little")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="stpredict-benchmark-") as folder:
        bench = Bench(Path(folder), arguments.videos, arguments.quick)
        print(f"`python -m benchmarks.data {' '.join(sys.argv[1:])}`, {machine()}.")
        for part in arguments.only:
            print(f"\n## {part}\n\nLoad average {os.getloadavg()[0]:.1f} before.\n", flush=True)
            PARTS[part](bench)


class Bench:
    """Shard sets, each made when it is first asked for, and how long to measure."""

    def __init__(self, folder: Path, videos: Path | None, quick: bool):
        self._folder, self._videos, self.quick = folder, videos, quick
        self.turns, self.seconds = (2, 0.5) if quick else (5, 4.0)

    @property
    def digits(self) -> Path:
        """960 videos of 17 frames of 64x64, in 96 shards."""
        count = 96 if self.quick else 960
        return self._sharded("digits", MovingDigitsSource(videos=count))

    @property
    def clip_sets(self) -> dict[str, Path]:
        """By a name for people."""
        sets = {"moving digits, 64x64": self.digits}
        if self._videos:
            sets[self._videos.name] = self._sharded("videos", FolderSource(path=self._videos))
        return sets

    @property
    def many_shards(self) -> Path:
        """10,000 shards of 1,000 digits in about 64 windows each, which are names of the same file."""
        run = self._folder / "many"
        if not run.exists():
            train = run / "train"
            train.mkdir(parents=True)
            samples = [
                {name: value for name, value in members.items() if not name.startswith("__")}
                for members in islice(endless(tars(self.digits)), 1000)
            ]
            blocks = sum(1 + -(-len(value) // 512) for members in samples for value in members.values())
            tar = TarShard(train, 0, window_bytes=512 * blocks // 64)
            for number, members in enumerate(samples):
                tar.add(f"{number:06d}", members)
            tar.finish(read_set(self.digits, "train").manifest.model_copy(update={"plan": ""}), 1, "")
            one = merge(train)
            names = [f"shard-{number:06d}" for number in range(100 if self.quick else 10_000)]
            for name in names[1:]:
                os.link(train / f"{names[0]}.tar", train / f"{name}.tar")
            shards = [one.shards[0].model_copy(update={"name": name}) for name in names]
            write_manifest(train, one.model_copy(update={"samples": 1000 * len(shards), "shards": shards}))
        return run

    def latents(self, grid: tuple[int, int, int], codes: int) -> tuple[Path, Manifest]:
        """10,000 clips of random ids."""
        clips = 1000 if self.quick else 10_000
        run = self._folder / "x".join(map(str, grid))
        shards = latent_shards(clips, 96)
        with LatentWriter(
            run / "train", clips=clips, shards=shards, grid=grid, codebook_size=codes, fingerprint="0" * 64
        ) as writer:
            for positions in writer.missing:
                ids = np.random.default_rng(positions.start).integers(codes, size=(len(positions), *grid))
                keys = [f"ApplyEyeMakeup/v_ApplyEyeMakeup_g{number:05d}_c01" for number in positions]
                writer.append(positions, ids, keys, [number % 101 for number in positions])
        return run, merge(run / "train")

    def _sharded(self, name: str, source: Source) -> Path:
        config = ShardConfig(run=self._folder / name, source=source, workers=2)
        if not config.run.exists():
            for split, plans in plan(config).plans.items():
                write_shards(config.run / split, plans, workers=config.workers)
                merge(config.run / split)
        return config.run


# decode


def decode(bench: Bench) -> None:
    for name, run in bench.clip_sets.items():
        manifest = read_set(run, "train").manifest
        infos = [json.loads(members["json"]) for members in islice(endless(tars(run)), manifest.samples)]
        decoders = ", ".join(sorted({info["decoder"] for info in infos}))
        print(f"{name}: {manifest.samples} videos in {len(manifest.shards)} shards, read by {decoders}\n")
        alone = {
            "stream, workers 0": partial(stream_rate, run, 0, bench.seconds),
            "bare loop": partial(bare_rate, run, decode_clip, bench.seconds),
            "bare loop, PyAV alone": partial(bare_rate, run, by_pyav, bench.seconds),
        }
        missing = ""
        try:
            from torchcodec.decoders import VideoDecoder

            torchcodec = partial(by_torchcodec, VideoDecoder)
            alone["bare loop, torchcodec"] = partial(bare_rate, run, torchcodec, bench.seconds)
        except (ImportError, OSError, RuntimeError) as error:  # the last two where its libraries do not load
            missing = f"\ntorchcodec: not installed ({str(error).splitlines()[0]})"
        show(CLIP_COSTS, in_turns(alone, bench.turns), "bare loop")
        print(missing and f"{missing}\n")
        both = {
            "stream, workers 2": partial(stream_rate, run, 2, bench.seconds),
            "two bare loops": partial(two_bare_rate, run, bench.seconds),
        }
        show(CLIP_COSTS, in_turns(both, bench.turns), "two bare loops")
        print()


def stream_rate(run: Path, workers: int, seconds: float) -> tuple[float, float]:
    """Of batches as training gets them, once the workers are under way."""
    with closing(clips(run, workers)) as batches:
        for step in range(4):
            batches.draw(step)
        clock, drawn = Clock(), 0
        while clock.wall_s < seconds:
            drawn += len(batches.draw(0)[0]["clip"])
        return clock.per_clip(drawn)


def bare_rate(run: Path, by: Decode, seconds: float) -> tuple[float, float]:
    decoded = bare_loop(tars(run), by)
    next(decoded)
    clock, drawn = Clock(), 0
    while clock.wall_s < seconds:
        next(decoded)
        drawn += 1
    return clock.per_clip(drawn)


def two_bare_rate(run: Path, seconds: float) -> tuple[float, float]:
    """Two processes with every other tar each."""
    context = multiprocessing.get_context("fork")
    counts = context.RawArray("q", 2)

    def loop(process: int) -> None:
        for number, _ in enumerate(bare_loop(tars(run)[process::2], decode_clip)):
            counts[process] = number

    processes = [context.Process(target=loop, args=(process,), daemon=True) for process in range(2)]
    for process in processes:
        process.start()
    while min(counts) < SHARE.batch_size:
        if not all(process.is_alive() for process in processes):
            raise RuntimeError("a process of the bare loop died")
        time.sleep(0.01)
    clock, before = Clock(), sum(counts)
    time.sleep(seconds)
    taken = clock.per_clip(sum(counts) - before)
    for process in processes:
        process.kill()
        process.join()
    return taken


class Clock:
    """Since its making: time, and processor time of this process and those that it has now started."""

    def __init__(self) -> None:
        main = psutil.Process()
        self._processes = [main, *main.children(recursive=True)]
        self._cpu_s, self._began = self._cpu(), time.perf_counter()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._began

    def per_clip(self, clips: int) -> tuple[float, float]:
        """What CLIP_COSTS names."""
        return clips / self.wall_s, 1000 * (self._cpu() - self._cpu_s) / clips

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(taken.user + taken.system for taken in times)


def bare_loop(paths: list[Path], by: Decode) -> Iterator[np.ndarray]:
    """The clips that the stream cuts too, epoch by epoch, in the order of the files."""
    for epoch in count():
        for members in once(paths):
            encoded = next(members[extension] for extension in EXTENSIONS if extension in members)
            about = json.loads(members["json"])
            info = VideoInfo(**{name: about[name] for name in VideoInfo.__dataclass_fields__})
            yield by(encoded, CLIP, generator("clip", SEED, epoch, members["__key__"]), info)


def by_pyav(encoded: bytes, config: ClipConfig, rng: np.random.Generator, info: VideoInfo) -> np.ndarray:
    return decode_clip(encoded, config, rng, replace(info, decoder="pyav"))


def by_torchcodec(
    decoder: type, encoded: bytes, config: ClipConfig, rng: np.random.Generator, info: VideoInfo
) -> np.ndarray:
    """The same clip through torchcodec's own index of frames, in one thread."""
    plan = Plan.draw(rng, config)
    video = decoder(encoded, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames = video.get_frames_at(list(clip_indices(info.frames, config, plan.start))).data.numpy()
    return np.stack([fit_frame(frame, config, plan) for frame in frames])


# first, enter


def first(bench: Bench) -> None:
    epoch = read_set(bench.digits, "train").manifest.samples
    show(("s",), in_turns(first_batches(bench.digits, epoch), 2 * bench.turns), "cold")


def enter(bench: Bench) -> None:
    run = bench.many_shards
    began = time.perf_counter()
    shards = read_set(run, "train").manifest.shards
    read_s = time.perf_counter() - began
    counts, streams = [shard.window_samples for shard in shards], stream_count(len(shards), None, 1, 2, str(run))
    epoch, windows = sum(map(sum, counts)), len(counts[0])
    print(f"{len(shards):,} shards: {epoch:,} clips, {windows} windows a shard; {streams:,} virtual streams.")
    print(f"The manifest is read in {read_s:.2f} s. Windows read for the first batch, and for one sample per stream:\n")
    print("| samples gone | place found, s | for the first batch | for all streams |")
    print("|---|---|---|---|")
    for name, gone in positions(epoch).items():
        order, began = Order(counts, streams, SEED), time.perf_counter()
        samples = order.samples(gone)
        first_samples = [next(samples)]
        found_s = time.perf_counter() - began
        first_samples += islice(samples, streams - 1)
        touched = {(stream, slot.epoch, slot.shard, slot.window) for stream, slot in first_samples}
        counted = mock.patch.object(ShardFiles, "read", autospec=True, side_effect=ShardFiles.read)
        with counted as read, closing(clips(run, 0, gone)) as batches:
            batches.draw(0)
        print(f"| {name}: {gone:,} | {found_s:.2f} | {read.call_count} | {len(touched):,} |", flush=True)
    print("\nFrom there to the first batch, manifest and workers included:\n")
    show(("s",), in_turns(first_batches(run, epoch), bench.turns), "cold")


def positions(epoch: int) -> dict[str, int]:
    return {"cold": 0, "deep in the first epoch": int(0.9 * epoch), "deep in epoch 50": int(50.9 * epoch)}


def first_batches(run: Path, epoch: int) -> dict[str, Side]:
    return {name: partial(first_batch_s, run, gone) for name, gone in positions(epoch).items()}


def first_batch_s(run: Path, gone: int) -> tuple[float]:
    """From no more than the config to the first batch, with two workers; the system's memory of the tars is dropped."""
    for path in {path.stat().st_ino: path for path in tars(run)}.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    with closing(clips(run, 2, gone)) as batches:
        batches.draw(0)
        return (time.perf_counter() - began,)


# memory


def memory(bench: Bench) -> None:
    total, every = (640, 32) if bench.quick else (20_000, 80)
    taken, began = [], time.perf_counter()
    with closing(clips(bench.digits, 2)) as batches:
        for step in range(total // SHARE.batch_size):
            batches.draw(step)
            if (step + 1) * SHARE.batch_size % every == 0:
                taken.append(resident_mb())
    spent = time.perf_counter() - began
    print(f"{total:,} clips of 17x64x64 in {spent:.0f} s; 2 workers and the main process, seen {len(taken)} times:\n")
    print("| clips | mean, MB | most, MB |\n|---|---|---|")
    quarters = np.array_split(taken, 4)
    for number, quarter in enumerate(quarters):
        print(f"| to {total * (number + 1) // 4:,} | {quarter.mean():.1f} | {quarter.max():.1f} |")
    print(f"\nLast quarter: {quarters[3].mean() / quarters[1].mean():.3f} times the second (within 3 % is wanted).")


def resident_mb() -> float:
    """What this process and its children hold, shared pages counted once."""
    main = psutil.Process()
    return sum(process.memory_full_info().pss for process in (main, *main.children(recursive=True))) / 2**20


# latents


def latents(bench: Bench) -> None:
    demo, of_demo = bench.latents(DEMO_GRID, DEMO_CODES)
    nbp, of_nbp = bench.latents(NBP_GRID, NBP_CODES)
    sides = {
        f"read, {grid_name(DEMO_GRID)} of the demo": partial(latent_rate, demo, bench.seconds / 4),
        f"read, {grid_name(NBP_GRID)} of NBP": partial(latent_rate, nbp, bench.seconds / 4),
        "the demo prior learns": DemoPrior(bench.seconds),
    }
    show(("tokens/s",), in_turns(sides, bench.turns), "the demo prior learns")
    print("\n| set | clips | ids, MB | tars, MB | added |\n|---|---|---|---|---|")
    for manifest in (of_demo, of_nbp):
        ids = manifest.samples * Latents(manifest).array_bytes
        size = sum(shard.bytes for shard in manifest.shards)
        name = f"{grid_name(manifest.grid)} {manifest.dtype}, {len(manifest.shards)} shards"
        print(f"| {name} | {manifest.samples:,} | {ids / 1e6:.2f} | {size / 1e6:.2f} | {size / ids - 1:.1%} |")


def latent_rate(run: Path, seconds: float) -> tuple[float]:
    batches = latent_batches(LatentDataConfig(latents=run, workers=1), "train", seed=SEED, share=SHARE)
    with closing(batches):
        for step in range(20):
            batches.draw(step)
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            tokens += batches.draw(0)[0]["latent"].numel()
        return (tokens / (time.perf_counter() - began),)


class DemoPrior:
    """Tokens/s of the demo prior's training steps on random ids, in fp32 with every core, in one process without
    DeepSpeed: faster than the demo itself."""

    def __init__(self, seconds: float):
        config = load(AnyJobConfig, "configs/priors/demo.yaml", ["tokenizer=none", "data.latents=none"])
        self._seconds, self._batch = seconds, config.training.batch_size
        self._model = NextBlockPrior(config.model, DEMO_CODES, DEMO_GRID)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)

    def __call__(self) -> tuple[float]:
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < self._seconds:
            ids = torch.randint(DEMO_CODES, (self._batch, self._model.order.tokens))
            logits = self._model(ids)
            F.cross_entropy(logits.flatten(0, 1), ids[:, self._model.order.block_tokens :].flatten()).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            tokens += ids.numel()
        return (tokens / (time.perf_counter() - began),)


# of all parts


def clips(run: Path, workers: int, gone: int = 0) -> TrainingBatches:
    config = ClipDataConfig(shards=run, clip=CLIP, workers=workers)
    return clip_batches(config, "train", seed=SEED, share=SHARE, consumed={"main": gone})


def tars(run: Path) -> list[Path]:
    return sorted((run / "train").glob("*.tar"))


def once(paths: list[Path]) -> Iterator[dict]:
    """Every sample of the tars, as WebDataset reads them."""
    return iter(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


def endless(paths: list[Path]) -> Iterator[dict]:
    while True:
        yield from once(paths)


def in_turns(sides: dict[str, Side], turns: int) -> dict[str, list[tuple[float, ...]]]:
    """What each side gives in each turn, after one that does not count; every other turn goes backwards."""
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in list(sides.items())[:: -1 if turn % 2 else 1]:
            values = side()
            if turn:
                taken[name].append(values)
    return taken


def show(units: tuple[str, ...], taken: dict[str, list[tuple[float, ...]]], against: str) -> None:
    """A table of medians, and of ratios to ``against`` with the least and the most of them."""
    print("| |" + "".join(f" {unit} | of {against} |" for unit in units))
    print("|---|" + "---|---|" * len(units))
    for name, turns in taken.items():
        cells = [name]
        for values, others in zip(zip(*turns, strict=True), zip(*taken[against], strict=True), strict=True):
            ratios = [value / other for value, other in zip(values, others, strict=True)]
            spread = f"{rounded(median(ratios))} ({rounded(min(ratios))} to {rounded(max(ratios))})"
            cells += [rounded(median(values)), "" if name == against else spread]
        print(f"| {' | '.join(cells)} |", flush=True)


def rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grid_name(grid: tuple[int, int, int]) -> str:
    return "x".join(map(str, grid))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    return f"{date.today()}, {len(psutil.Process().cpu_affinity())} cores of {cpu}, {versions}"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


PARTS: dict[str, Callable[[Bench], None]] = {
    "decode": decode,
    "first": first,
    "enter": enter,
    "memory": memory,
    "latents": latents,
}


if __name__ == "__main__":
    main()
