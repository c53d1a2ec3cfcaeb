"""Training a tokenizer: reconstruct clips; where the config says so, so that they look right and deceive a
discriminator."""

from collections.abc import Iterator, Mapping, Sequence
from math import log2, prod

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.config import ClipDataConfig
from data_pipeline.stream import clip_batches, clip_evaluation_batches
from data_pipeline.transforms import to_clip, to_video
from stpredict.evaluation.frame_metrics import SSIM_WINDOW, frame_mse, frame_psnr, frame_ssim
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import TokenizerExport
from stpredict.losses.config import TokenizerLossConfig
from stpredict.losses.patch_gan import PatchGan
from stpredict.losses.perceptual import feature_distance
from stpredict.quantizers.code_use import perplexity
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.task import Batch, Forward, Share, Sums, Task, TrainingBatches

PICTURED = 4


class TokenizerTask(Task):
    def __init__(self, model: CausalCnnConfig, loss: TokenizerLossConfig, data: ClipDataConfig, seed: int):
        clips = {"data.clip": data.clip} | {f"data.mix.{name}.clip": other.clip for name, other in data.mix.items()}
        for where, clip in clips.items():
            model.check_clip(clip, where)
            if loss.perceptual:
                loss.perceptual.network.check_clip(clip, f"loss.perceptual, for {where}")
        self.model = CausalCnnTokenizer(model)
        self.weights = {name: weight for name, weight in (("l1", loss.l1), ("l2", loss.l2)) if weight}
        self.perceptual = None
        if loss.perceptual:
            self.perceptual = feature_distance(loss.perceptual.network, model.video_channels)
            if loss.perceptual.weight:
                self.weights["perceptual"] = loss.perceptual.weight
        self.frame_metrics = ["mse", "psnr"]
        if min(data.clip.size) >= SSIM_WINDOW:
            self.frame_metrics.append("ssim")
        if self.perceptual:
            self.frame_metrics.append(self.perceptual.name)
        self.metrics = (*self.frame_metrics, "codes_used", "codebook_perplexity", "codebook_entropy_bits")
        self.gan = PatchGan(loss.adversarial, model.video_channels) if loss.adversarial else None
        if self.gan:
            self.discriminator = self.gan.discriminator
            self.adversarial_weights, self.discriminator_weights = self.gan.model_weights, self.gan.weights
            self.last_layer = self.model.decoder.conv_out
        self.data, self.seed, self.quarantined = data, seed, {}

    def layers(self) -> Sequence[nn.Module]:
        encoder, decoder = self.model.encoder, self.model.decoder
        return [*encoder.stages, *encoder.middle, *decoder.middle, *decoder.stages]

    def networks(self) -> Sequence[nn.Module]:
        return [self.perceptual] if self.perceptual else []

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        return clip_batches(
            self.data, "train", seed=self.seed, share=share, consumed=consumed, quarantined=self.quarantined
        )

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        data = self.data.model_copy(update={"clip": self.data.clip.unaugmented})
        return clip_evaluation_batches(data, "val", seed=self.seed, share=share, quarantined=self.quarantined)

    def counts(self, batch: Batch) -> dict[str, float]:
        clips, *sides, _ = batch["clip"].shape
        counts = dict.fromkeys(("l1", "l2"), float(batch["clip"].numel())) | {"perceptual": float(clips * sides[0])}
        return counts | (self.gan.counts(clips, *sides) if self.gan else {})

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        video = to_video(batch["clip"])
        reconstruction, ids = forward(video)
        reconstruction = reconstruction.float()
        if self.gan:
            batch["reconstruction"] = reconstruction
        error = reconstruction - video
        sums = {"l1": error.abs().sum(), "l2": error.square().sum(), "codebook": self._uses(ids)}
        if "perceptual" in self.weights:
            sums["perceptual"] = self.perceptual(reconstruction, video).sum()
        return sums

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
        video = to_video(batch["clip"])
        reconstruction, ids = forward(video)
        made, weight = to_clip(reconstruction.float()), batch["weight"].double()
        mse = frame_mse(made, batch["clip"])
        of_frames = {"mse": mse, "psnr": frame_psnr(mse)}
        if "ssim" in self.metrics:  # clip by clip: its maps in float64 take some memory
            pairs = zip(made.split(1), batch["clip"].split(1), strict=True)
            of_frames["ssim"] = torch.cat([frame_ssim(*pair) for pair in pairs])
        if self.perceptual:
            of_frames[self.perceptual.name] = self.perceptual(to_video(made), video)
        sums = {name: (values.mean(1) * weight).sum() for name, values in of_frames.items()}
        return sums | {"clips": weight.sum(), "used": self._uses(ids[weight > 0])}

    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        uses = sums["used"]
        means = {name: float(sums[name] / sums["clips"]) for name in self.frame_metrics}
        used = {"codes_used": float((uses > 0).sum()), "codebook_perplexity": perplexity(uses)}
        return means | used | {"codebook_entropy_bits": log2(used["codebook_perplexity"])}

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
