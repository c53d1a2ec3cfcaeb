"""Training a tokenizer: reconstruct clips, and deceive a discriminator where the config has one."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.config import ClipDataConfig
from data_pipeline.stream import clip_batches, clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video
from stpredict.evaluation.frame_metrics import frame_mse, frame_psnr
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import TokenizerExport
from stpredict.losses.config import TokenizerLossConfig
from stpredict.losses.patch_gan import PatchGan
from stpredict.quantizers.code_use import perplexity
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.task import Batch, Forward, Share, Sums, Task, TrainingBatches

PICTURED = 4


class TokenizerTask(Task):
    metrics = ("mse", "psnr", "codes_used", "codebook_perplexity")

    def __init__(self, model: CausalCnnConfig, loss: TokenizerLossConfig, data: ClipDataConfig, seed: int):
        model.check_clip(data.clip, "data.clip")
        for name, other in data.mix.items():
            model.check_clip(other.clip, f"data.mix.{name}.clip")
        self.model = CausalCnnTokenizer(model)
        self.weights = {name: weight for name, weight in (("l1", loss.l1), ("l2", loss.l2)) if weight}
        self.gan = PatchGan(loss.adversarial, model.video_channels) if loss.adversarial else None
        if self.gan:
            self.discriminator = self.gan.discriminator
            self.adversarial_weights, self.discriminator_weights = self.gan.model_weights, self.gan.weights
            self.last_layer = self.model.decoder.conv_out
        self.data, self.seed, self.quarantined = data, seed, {}

    def layers(self) -> Sequence[nn.Module]:
        encoder, decoder = self.model.encoder, self.model.decoder
        return [*encoder.stages, *encoder.middle, *decoder.middle, *decoder.stages]

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        return clip_batches(
            self.data, "train", seed=self.seed, share=share, consumed=consumed, quarantined=self.quarantined
        )

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        data = self.data.model_copy(update={"clip": self.data.clip.unaugmented})
        return clip_evaluation_batches(data, "val", seed=self.seed, share=share, quarantined=self.quarantined)

    def counts(self, batch: Batch) -> dict[str, float]:
        clips, *sides, _ = batch["clip"].shape
        counts = dict.fromkeys(("l1", "l2"), float(batch["clip"].numel()))
        return counts | (self.gan.counts(clips, *sides) if self.gan else {})

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        video = to_video(batch["clip"])
        reconstruction, ids = forward(video)
        reconstruction = reconstruction.float()
        if self.gan:
            batch["reconstruction"] = reconstruction
        error = reconstruction - video
        return {"l1": error.abs().sum(), "l2": error.square().sum(), "codebook": self._uses(ids)}

    def adversarial_step(self, judge: Forward, batch: Batch) -> Sums:
        return self.gan.model_step(judge, batch["reconstruction"])

    def discriminator_step(self, forward: Forward, batch: Batch, update: int) -> Sums:
        return self.gan.discriminator_step(forward, to_video(batch["clip"]), batch["reconstruction"], update)

    def discriminator_updated(self, means: Sums) -> None:
        self.gan.updated(means)

    def tokens(self, batch: Batch) -> int:
        clips, *video, _ = batch["clip"].shape
        return clips * prod(self.model.config.grid(*video))

    def validation_step(self, forward: Forward, batch: Batch) -> Sums:
        reconstruction, ids = forward(to_video(batch["clip"]))
        mse = frame_mse(to_clip(reconstruction.float()), batch["clip"])
        weight = batch["weight"].double()
        used = self._uses(ids[weight > 0])
        psnr = frame_psnr(mse).mean(1)
        return {"mse": (mse.mean(1) * weight).sum(), "psnr": (psnr * weight).sum(), "clips": weight.sum(), "used": used}

    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "mse": float(sums["mse"] / sums["clips"]),
            "psnr": float(sums["psnr"] / sums["clips"]),
            "codes_used": float((sums["used"] > 0).sum()),
            "codebook_perplexity": perplexity(sums["used"]),
        }

    def _uses(self, ids: Tensor) -> Tensor:
        """How often each code is among ``ids``: int64 ``(codes,)``. What is made of latents that are not finite is no
        code and is not counted: such a step's loss is not finite either, and skipped."""
        codes = self.model.config.codebook_size
        ids = torch.where((ids >= 0) & (ids < codes), ids, codes)
        return torch.bincount(ids.flatten(), minlength=codes + 1)[:codes]

    def picture(self, forward: Forward, batch: Batch) -> np.ndarray:
        clips = batch["clip"][:PICTURED]
        reconstruction = to_clip(forward(to_video(clips))[0].float())
        pairs = zip(clips.cpu().numpy(), reconstruction.cpu().numpy(), strict=True)
        return stacked([side_by_side({"truth": truth, "reconstruction": made}) for truth, made in pairs])

    def export_config(self) -> TokenizerExport:
        return TokenizerExport(clip=self.data.clip, model=self.model.config)
