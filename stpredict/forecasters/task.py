"""Training a forecaster: frames in, the frames that follow out."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.stream import clip_batches, clip_evaluation_batches
from stpredict.evaluation.pictures import side_by_side, stacked
from stpredict.exports import ForecasterExport
from stpredict.forecasters.build import build_forecaster
from stpredict.forecasters.config import AnyForecaster, ForecasterDataConfig, ForecasterLossConfig
from stpredict.forecasters.kept_branches import WithKeptBranches
from stpredict.forecasters.published_macs import published_macs
from stpredict.forecasters.scaling import Scaling
from stpredict.forecasters.simvp import Forecast
from stpredict.losses.differential_divergence import differential_divergence
from stpredict.training.task import Batch, Forward, Share, Sums, Task, TrainingBatches

PICTURED = 4


class ForecasterTask(Task):
    """``scalings``: of the training and of the validation split."""

    metrics = (
        "loss",
        *(f"{of}{name}" for of in ("", "frame_", "persistence_", "physical_") for name in ("mse", "mae")),
        "physical_rmse",
    )

    def __init__(
        self,
        model: AnyForecaster,
        loss: ForecasterLossConfig,
        data: ForecasterDataConfig,
        scalings: tuple[Scaling, Scaling],
        seed: int,
    ):
        self.model = build_forecaster(model)
        self.loss, self.data, self.seed, self.quarantined = loss, data, seed, {}
        self.clips = data.clips(model)
        self.training_scaling, self.validation_scaling = scalings
        weights = {"mse": loss.mse, "mae": loss.mae, "differential_divergence": loss.differential_divergence}
        if self.model.commits:
            weights["commitment"] = loss.commitment
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def layers(self) -> Sequence[nn.Module]:
        return self.model.layers()

    def published_macs(self, computed: float) -> float:
        return published_macs(self.model, computed)

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        batches = clip_batches(
            self.clips, "train", seed=self.seed, share=share, consumed=consumed, quarantined=self.quarantined
        )
        return WithKeptBranches(batches, self.model, self.seed) if any(self.model.drop_rates) else batches

    def validation_batches(self, share: Share) -> Iterator[Batch]:
        clips = self.clips.model_copy(update={"clip": self.clips.clip.unaugmented})
        return clip_evaluation_batches(
            clips, self.data.validation, seed=self.seed, share=share, quarantined=self.quarantined
        )

    @property
    def learned_frames(self) -> int:
        """Of each clip, those that carry loss in training."""
        return self.model.config.output_frames

    def learned(self, forward: Forward, batch: Batch) -> tuple[Forecast, Tensor]:
        """What is predicted of those in training, and the truth."""
        given, truth = self._split(self.training_scaling.scaled(batch["clip"]))
        return forward(given, *([batch["kept"]] if "kept" in batch else [])), truth

    def counts(self, batch: Batch) -> dict[str, float]:
        config, clips = self.model.config, float(len(batch["clip"]))
        values = clips * self.learned_frames * config.channels * math.prod(config.size)
        steps = max(1, self.learned_frames - 1)
        return {"mse": values, "mae": values, "differential_divergence": clips * steps, "commitment": clips}

    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        forecast, truth = self.learned(forward, batch)
        prediction = forecast.frames.float()
        error = prediction - truth
        sums = {"mse": error.square().sum(), "mae": error.abs().sum()}
        if "differential_divergence" in self.weights:
            sums["differential_divergence"] = differential_divergence(prediction, truth, self.loss.temperature).sum()
        if "commitment" in self.weights:
            sums["commitment"] = forecast.commitment.float() * len(truth)
        return sums

    def validation_step(self, forward: Forward, batch: Batch) -> Sums:
        given, truth = self._split(self.validation_scaling.scaled(batch["clip"]))
        prediction = forward(given).frames.float()
        weight = batch["weight"].double()
        errors = {
            "": prediction - truth,
            "persistence_": given[:, :, -1:] - truth,
            "physical_": (prediction - truth) * self.validation_scaling.of_channels(truth.device),
        }
        sums = {"clips": weight.sum()}
        for name, error in errors.items():
            sums[f"{name}mse"] = (error.double().square().mean(dim=(1, 2, 3, 4)) * weight).sum()
            sums[f"{name}mae"] = (error.double().abs().mean(dim=(1, 2, 3, 4)) * weight).sum()
        if "differential_divergence" in self.weights:
            divergence = differential_divergence(prediction, truth, self.loss.temperature)
            steps = max(1, divergence.shape[1])
            sums["differential_divergence"] = (divergence.double().sum(dim=1) / steps * weight).sum()
        return sums

    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        """``loss``, ``mse`` and ``mae`` are of scaled values, as in training; the loss leaves out a quantizer's part.
        ``frame_``: sums over a frame instead of means, as papers on video print them. ``physical_``: in grey levels or
        the units of the field. ``persistence_``: of the last given frame, scaled."""
        means = {name: float(value / sums["clips"]) for name, value in sums.items() if name != "clips"}
        values = self.model.config.channels * math.prod(self.model.config.size)
        return {
            "loss": sum(weight * means[name] for name, weight in self.weights.items() if name in means),
            **means,
            "physical_rmse": math.sqrt(means["physical_mse"]),
            "frame_mse": values * means["mse"],
            "frame_mae": values * means["mae"],
        }

    def picture(self, forward: Forward, batch: Batch) -> np.ndarray:
        given, truth = self._split(self.validation_scaling.scaled(batch["clip"][:PICTURED]))
        with torch.compiler.set_stance("force_eager"):  # so small a batch would be compiled for its own size
            prediction = forward(given).frames.float()
        rows = []
        for shown in zip(given, truth, prediction, strict=True):
            before, after, made = (grey_levels(frames, torch.cat(shown[:2], dim=1)) for frames in shown)
            clips = {"truth": np.concatenate([before, after]), "prediction": np.concatenate([before, made])}
            rows.append(side_by_side(clips))
        return stacked(rows)

    def export_config(self) -> ForecasterExport:
        return ForecasterExport(
            clip=self.clips.clip,
            model=self.model.config,
            scaling=self.data.scaling,
            channels=list(self.training_scaling.channels),
            units=list(self.training_scaling.units),
            offset=self.training_scaling.offset,
            scale=self.training_scaling.scale,
        )

    def _split(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output frames of ``(b, c, t, h, w)``."""
        config = self.model.config
        return video.split([config.input_frames, config.output_frames], dim=2)


def grey_levels(frames: Tensor, among: Tensor) -> np.ndarray:
    """Frames ``(c, t, h, w)`` to uint8 ``(t, h, w, 1 or 3)``: black to white is the range of ``among``. Of other than
    three channels the first is shown."""
    shown, range_of = (x if len(x) == 3 else x[:1] for x in (frames, among))
    low, high = range_of.min(), range_of.max()
    levels = ((shown - low) / (high - low).clamp_min(1e-12) * 255).round().clamp(0, 255)
    return levels.permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()
