"""Training a prior: predict the next block of tokens."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from data_pipeline.seeding import share as chance_of
from data_pipeline.transforms import to_clip
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import PriorExport
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.data import PriorData, TrainedTokenizer
from stpredict.priors.next_block import NextBlockPrior
from stpredict.priors.prefixes import text_tokenizer_hash
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.next_block import continue_tokens
from stpredict.training.drawn import Drawn
from stpredict.training.task import Batch, Forward, Share, Sums, Task, TrainingBatches

PICTURED = 4


class PriorTask(Task):
    """``tokenizer`` decodes the pictures, in which ``given_latent_frames`` are given. Tokens of latent frames before
    ``loss_from`` carry no loss. ``seed`` says which samples lose their prefix."""

    metrics = ("cross_entropy", "accuracy")

    def __init__(
        self,
        model: NextBlockConfig,
        data: PriorData,
        tokenizer: TrainedTokenizer | None,
        given_latent_frames: int,
        loss_from: int = 0,
        seed: int = 0,
    ):
        self.data, self.tokenizer, self.given_latent_frames, self.seed = data, tokenizer, given_latent_frames, seed
        self.prefixes = data.prefixes(model)
        classes = len(self.prefixes.classes) if self.prefixes else 0
        try:
            self.model = NextBlockPrior(model, data.codebook_size, data.grid, classes)
        except ValueError as error:
            raise UsageError(f"model.block: {error}") from error
        self.score_from = max(self.model.first_predicted, loss_from * math.prod(data.grid[1:]))
        if loss_from % model.block[0] or not loss_from < data.grid[0]:
            raise UsageError(
                f"loss_from {loss_from}: latent frames without loss must be whole blocks (model.block) and fewer than "
                f"the {data.grid[0]} there are"
            )
        self.weights = {"cross_entropy": 1.0}
        self.quarantined = {}

    def layers(self) -> Sequence[nn.Module]:
        return self.model.layers

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        batches = self.data.training_batches(share, consumed, self.quarantined)
        return (
            WithoutSomeLabels(batches, self.model.config.conditioning.dropout, self.seed) if self.prefixes else batches
        )

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        return self.data.validation_batches(share, self.quarantined)

    def counts(self, batch: Batch) -> dict[str, float]:
        targets = float(len(batch["key"]) * (self.model.order.tokens - self.score_from))
        return {"cross_entropy": targets, "accuracy": targets}

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        loss, right = self._per_token(forward, batch)
        return {"cross_entropy": loss.sum(), "accuracy": right.sum()}

    def tokens(self, batch: Batch) -> int:
        return len(batch["key"]) * self.model.order.tokens

    def forward_flops(self, sequence: Tensor, *_: Tensor, score_from: int | None = None) -> float:
        return len(sequence) * self.model.flops(score_from)

    def validation_step(self, forward: Forward, batch: Batch) -> Sums:
        loss, right = self._per_token(forward, batch)
        weight = batch["weight"][:, None].double()
        tokens = weight.sum() * loss.shape[1]
        return {"cross_entropy": (loss * weight).sum(), "accuracy": (right * weight).sum(), "tokens": tokens}

    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        return {name: float(sums[name] / sums["tokens"]) for name in self.metrics}

    def picture(self, forward: Forward, batch: Batch) -> np.ndarray:
        latent = self.data.tokens(batch)[:PICTURED]
        given = latent[:, : self.given_latent_frames]
        prefix = self.prefixes and self.prefixes.of(batch["label"][:PICTURED])
        with torch.compiler.set_stance("force_eager"):  # every step of decoding would be compiled for its own lengths
            predicted = continue_tokens(
                self.model, given, SamplingConfig(), range(len(latent)), prefix, forward=forward
            )
        decode = self.tokenizer.model.to(latent.device).decode
        clips = (to_clip(decode(ids)).cpu().numpy() for ids in (latent, predicted))
        pairs = zip(*clips, strict=True)
        return stacked([side_by_side({"truth, decoded": truth, "predicted": made}) for truth, made in pairs])

    def export_config(self) -> PriorExport:
        conditioning = self.model.config.conditioning
        return PriorExport(
            classes=list(self.prefixes.classes) if self.prefixes else [],
            text_tokenizer=text_tokenizer_hash(conditioning.tokenizer) if conditioning.kind == "text" else None,
            codebook_size=self.model.codebook_size,
            grid=self.model.order.grid,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            model=self.model.config,
        )

    def _per_token(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats and whether the likeliest token is right, fp32 ``(b, tokens that carry loss)``."""
        sequence = self.model.order.to_sequence(self.data.tokens(batch))
        prefix = self.prefixes.of(batch["label"]) if self.prefixes else ()
        return forward(sequence, *prefix, score_from=self.score_from)


class WithoutSomeLabels(Drawn):
    """Training batches in which a ``share`` of the samples has label -1: a function of seed, step and key."""

    def __init__(self, batches: TrainingBatches, share: float, seed: int):
        super().__init__(batches)
        self._share, self._seed = share, seed

    def add(self, step: int, batch: Batch) -> None:
        chance = [chance_of("conditioning dropout", self._seed, step, key) for key in batch["key"]]
        dropped = torch.tensor(chance) < self._share
        batch["label"] = batch["label"].masked_fill(dropped, -1)
