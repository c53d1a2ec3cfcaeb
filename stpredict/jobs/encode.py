"""Caches latents: every clip of a shard set through a trained tokenizer, into latent shards.

The clips of all passes stand in one order, pass after pass, and every process of every part encodes the shards of it
that are its own, one after another; those that are finished are kept.
"""

import logging
from collections.abc import Iterator

import torch

from data_pipeline.config import ClipDataConfig
from data_pipeline.disk import check_space
from data_pipeline.latents import LatentWriter, latent_shards
from data_pipeline.manifest import merge
from data_pipeline.order import Share
from data_pipeline.shard_set import read_set
from data_pipeline.stream import clip_evaluation_batches
from stpredict.config import canonical_json
from stpredict.exports import load_tokenizer
from stpredict.jobs.config import EncodeConfig
from stpredict.run import Progress, Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.clips import clip_tokens, clips_for
from stpredict.tokenizers.config import WHOLE
from stpredict.training.ranks import Ranks, join_ranks

log = logging.getLogger(__name__)


def run(config: EncodeConfig, run: Run) -> None:
    tokenizer, export, fingerprint = load_tokenizer(config.tokenizer)
    clips = clips_for(config.data, config.tokenizer, export)
    config.tiling.check(export.model, "tiling")
    with join_ranks() as ranks:
        splits = [
            _Split(config, clips, "train", config.passes, tokenizer, fingerprint, ranks),
            _Split(config, clips, "val", 1, tokenizer, fingerprint, ranks),
        ]
        check_space(config.run, sum(split.writer.missing_bytes for split in splits) * ranks.size)
        mine = sum(split.clips for split in splits) // (config.parts * ranks.size)
        progress = Progress(run, mine * ranks.size, "clip") if ranks.is_main else None
        done = mine - sum(len(positions) for split in splits for positions in split.writer.missing)
        for split in splits:
            for count in split.encode(ranks.device):
                done += count
                if progress:
                    progress.update(min(max(done, 0), mine) * ranks.size, f"encoding {split.name}")
        ranks.barrier()
        if progress:
            progress.update(progress.steps, "encoded")
        if ranks.is_main and config.parts == 1:
            for split in splits:
                manifest = merge(split.folder)
                log.info("%s: %d clips of %s tokens", split.folder, manifest.samples, manifest.grid)


class _Split:
    """One split and this process's share of its clips. A clip's position is its number in the split plus the clips of
    the passes before."""

    def __init__(
        self,
        config: EncodeConfig,
        data: ClipDataConfig,
        name: str,
        passes: int,
        tokenizer: CausalCnnTokenizer,
        fingerprint: str,
        ranks: Ranks,
    ):
        clip = data.clip if name == "train" else data.clip.unaugmented
        self.name, self.folder, self._passes = name, config.run / name, passes
        self._config, self._tokenizer = config, tokenizer
        self._quarantined: dict[str, str] = {}  # what stops a worker in one pass is not tried in the next
        self._data = data.model_copy(update={"clip": clip})
        source = read_set(data.shards, name).manifest
        self._per_pass = source.samples * clip.per_video
        self.clips = self._per_pass * passes
        tiled = "" if config.tiling == WHOLE else f" tiling {canonical_json(config.tiling)}"
        shards, writers = latent_shards(self.clips, config.shards), config.parts * ranks.size
        if shards < writers and ranks.is_main:
            log.warning("%s: %d shards for %d processes: the others have nothing to do", self.folder, shards, writers)
        self.writer = LatentWriter(
            self.folder,
            clips=self.clips,
            shards=shards,
            grid=tokenizer.config.grid(clip.frames, *clip.size),
            codebook_size=tokenizer.config.codebook_size,
            fingerprint=fingerprint,
            clips_per_member=config.clips_per_member,
            writer=config.part + config.parts * ranks.rank,  # so that a shard's number tells its part
            writers=writers,
            plan=f"{canonical_json(clip)} seed {config.seed} passes {passes}{tiled} of {source.model_dump_json()}",
            classes=source.classes,
            clip=clip,
        )

    def encode(self, device: torch.device) -> Iterator[int]:
        """Writes what is missing of this process's shards; yields, batch by batch, how many clips it has written."""
        with self.writer as writer:
            for number in range(self._passes):
                start = number * self._per_pass
                of_pass = range(start, start + self._per_pass)
                samples = [position - start for part in writer.missing for position in part if position in of_pass]
                if samples:
                    yield from self._encode_pass(number, samples, device)

    def _encode_pass(self, number: int, samples: list[int], device: torch.device) -> Iterator[int]:
        """The clips ``samples``, numbers in the split, of one pass."""
        share, seed = Share(0, 1, self._config.batch_size), self._config.seed
        batches = clip_evaluation_batches(
            self._data,
            self.name,
            seed=seed,
            share=share,
            samples=samples,
            epoch=number,
            quarantined=self._quarantined,
        )
        for batch in batches:
            rows = (batch["weight"] > 0).nonzero()[:, 0].tolist()  # the others are unreadable, or fill up the batch
            if rows:
                clips, config = batch["clip"].to(device), self._config
                tokens = clip_tokens(self._tokenizer, clips, config.batch_size, config.tiling)
                keys = [batch["key"][row] for row in rows]
                self.writer.append(
                    (batch["index"][rows] + number * self._per_pass).tolist(),
                    tokens[rows].cpu().numpy(),
                    keys if self._passes == 1 else [f"{key}-{number}" for key in keys],
                    batch["label"][rows].tolist(),
                )
            yield len(rows)
