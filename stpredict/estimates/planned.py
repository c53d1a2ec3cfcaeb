"""A training as it is planned: its task on the meta device, without data, and batches of the shapes that it would
see."""

from dataclasses import dataclass

import torch

from data_pipeline.errors import UsageError
from stpredict.jobs.config import PriorJobConfig, TokenizerJobConfig
from stpredict.priors.config import LatentConfig
from stpredict.priors.data import PlannedLatents
from stpredict.priors.task import PriorTask
from stpredict.tokenizers.task import TokenizerTask
from stpredict.training.task import Batch, Task

TrainConfig = TokenizerJobConfig | PriorJobConfig


@dataclass(frozen=True)
class Planned:
    """``sample`` is one sample of a batch, on the meta device: a key and a tensor without its batch axis."""

    config: TrainConfig
    task: Task
    sample: dict[str, torch.Tensor]

    def batch(self, size: int, device: str = "meta") -> Batch:
        """As the stream would give it to one rank."""
        tensors = {name: one.new_empty(size, *one.shape, device=device) for name, one in self.sample.items()}
        return {"key": [str(number) for number in range(size)], **tensors}


def plan_training(config: TrainConfig) -> Planned:
    """The model is not initialised: nothing is computed. UsageError where the config leaves sizes open."""
    with torch.device("meta"):
        match config:
            case TokenizerJobConfig():
                clip = config.data.clip
                task = TokenizerTask(config.model, config.loss, config.data, config.seed)
                sample = {"clip": torch.empty(clip.frames, *clip.size, clip.channels, dtype=torch.uint8)}
            case PriorJobConfig():
                latent = _latent(config)
                task = PriorTask(config.model, PlannedLatents(latent), None, 0)
                sample = {"latent": torch.empty(latent.grid, dtype=torch.int64)}
    return Planned(config, task, sample)


def _latent(config: PriorJobConfig) -> LatentConfig:
    if config.latent:
        return config.latent
    raise UsageError(
        "how many tokens of how many codes the prior sees is not known yet: give latent.grid=[5,16,16] "
        "latent.codebook_size=64000"
    )
