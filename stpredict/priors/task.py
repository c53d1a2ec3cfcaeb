"""Training a prior: predict the next block of tokens."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from data_pipeline.transforms import to_clip
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import PriorExport
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.data import PriorData, TrainedTokenizer
from stpredict.priors.next_block import NextBlockPrior
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.next_block import continue_tokens
from stpredict.training.task import Batch, Forward, Share, Sums, Task, TrainingBatches

PICTURED = 4


class PriorTask(Task):
    metrics = ("cross_entropy", "accuracy")

    """``tokenizer`` decodes the pictures, in which ``given_latent_frames`` are given."""

    def __init__(
        self, model: NextBlockConfig, data: PriorData, tokenizer: TrainedTokenizer | None, given_latent_frames: int
    ):
        self.data, self.tokenizer, self.given_latent_frames = data, tokenizer, given_latent_frames
        try:
            self.model = NextBlockPrior(model, data.codebook_size, data.grid)
        except ValueError as error:
            raise UsageError(f"model.block: {error}") from error
        self.weights = {"cross_entropy": 1.0}
        self.quarantined = {}

    def layers(self) -> Sequence[nn.Module]:
        return self.model.layers

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        return self.data.training_batches(share, consumed, self.quarantined)

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        return self.data.validation_batches(share, self.quarantined)

    def counts(self, batch: Batch) -> dict[str, float]:
        targets = float(len(batch["key"]) * (self.model.order.tokens - self.model.order.sizes[0]))
        return {"cross_entropy": targets, "accuracy": targets}

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        loss, right = self._per_token(forward, batch)
        return {"cross_entropy": loss.sum(), "accuracy": right.sum()}

    def tokens(self, batch: Batch) -> int:
        return len(batch["key"]) * self.model.order.tokens

    def forward_flops(self, sequence: Tensor) -> float:
        return len(sequence) * self.model.flops()

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
        predicted = continue_tokens(self.model, given, SamplingConfig(), range(len(latent)), forward)
        decode = self.tokenizer.model.to(latent.device).decode
        clips = (to_clip(decode(ids)).cpu().numpy() for ids in (latent, predicted))
        pairs = zip(*clips, strict=True)
        return stacked([side_by_side({"truth, decoded": truth, "predicted": made}) for truth, made in pairs])

    def export_config(self) -> PriorExport:
        return PriorExport(
            codebook_size=self.model.codebook_size,
            grid=self.model.order.grid,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            model=self.model.config,
        )

    def _per_token(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats and whether the likeliest token is right, ``(b, n - block)``, fp32."""
        sequence = self.model.order.to_sequence(self.data.tokens(batch))
        logits = forward(sequence).float()
        targets = sequence[:, self.model.order.sizes[0] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return loss, (logits.argmax(-1) == targets).float()
