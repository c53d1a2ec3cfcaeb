"""Training a prior: predict the next block of cached latents."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import LatentDataConfig
from data_pipeline.errors import UsageError
from data_pipeline.manifest import read_manifest
from data_pipeline.storage import child
from data_pipeline.stream import latent_batches, latent_evaluation_batches
from data_pipeline.transforms import to_clip
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import PriorExport, load_tokenizer
from stpredict.priors.config import NextBlockConfig, given_latent_frames
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.next_block import continue_tokens
from stpredict.training.task import Batch, Forward, Share, Sums, Task

PICTURED = 4


class PriorTask(Task):
    def __init__(self, model: NextBlockConfig, data: LatentDataConfig, tokenizer: Path, given_frames: int, seed: int):
        manifest = read_manifest(child(data.latents, "train"))
        self.tokenizer, self.tokenizer_export, self.fingerprint = load_tokenizer(tokenizer)
        if manifest.fingerprint != self.fingerprint:
            raise UsageError(
                f"{data.latents}: made by another tokenizer (fingerprint {manifest.fingerprint[:12]}) than {tokenizer} "
                f"({self.fingerprint[:12]}); encode the clips again with this one"
            )
        try:
            self.model = NextBlockPrior(model, manifest.codebook_size, manifest.grid)
        except ValueError as error:
            raise UsageError(f"model.block: {error}") from error
        read_manifest(child(data.latents, "val"))  # a missing split is said now, not at the first validation
        clip, export = self.tokenizer_export.clip, self.tokenizer_export.model
        self.given_latent_frames = given_latent_frames(given_frames, clip, export, model)
        self.weights = {"cross_entropy": 1.0}
        self.data, self.seed = data, seed

    def training_batches(self, share: Share, consumed: int) -> Iterator[Batch]:
        return latent_batches(self.data, "train", seed=self.seed, consumed=consumed, **asdict(share))

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        return latent_evaluation_batches(self.data, "val", seed=self.seed, **asdict(share))

    def counts(self, batch: Batch) -> dict[str, float]:
        targets = float(batch["latent"].shape[0] * (self.model.order.tokens - self.model.order.block_tokens))
        return {"cross_entropy": targets, "accuracy": targets}

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        loss, right = self._per_token(forward, batch)
        return {"cross_entropy": loss.sum(), "accuracy": right.sum()}

    def validation_step(self, forward: Forward, batch: Batch) -> Sums:
        loss, right = self._per_token(forward, batch)
        weight = batch["weight"][:, None].double()
        tokens = weight.sum() * loss.shape[1]
        return {"cross_entropy": (loss * weight).sum(), "accuracy": (right * weight).sum(), "tokens": tokens}

    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        return {name: float(sums[name] / sums["tokens"]) for name in ("cross_entropy", "accuracy")}

    def picture(self, forward: Forward, batch: Batch) -> np.ndarray:
        latent = batch["latent"][:PICTURED]
        given = latent[:, : self.given_latent_frames]
        predicted = continue_tokens(self.model, given, SamplingConfig(), range(len(latent)), forward)
        self.tokenizer.to(latent.device)
        clips = (to_clip(self.tokenizer.decode(ids)).cpu().numpy() for ids in (latent, predicted))
        pairs = zip(*clips, strict=True)
        return stacked([side_by_side({"truth, decoded": truth, "predicted": made}) for truth, made in pairs])

    def export_config(self) -> PriorExport:
        return PriorExport(
            codebook_size=self.model.codebook_size,
            grid=self.model.order.grid,
            tokenizer_fingerprint=self.fingerprint,
            model=self.model.config,
        )

    def _per_token(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats and whether the likeliest token is right, ``(b, n - block)``, fp32."""
        sequence = self.model.order.to_sequence(batch["latent"])
        logits = forward(sequence).float()
        targets = sequence[:, self.model.order.block_tokens :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return loss, (logits.argmax(-1) == targets).float()
