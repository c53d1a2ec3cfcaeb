"""A training as it is planned: its task on the meta device, without data, and batches of the shapes that it would
see."""

from dataclasses import dataclass
from functools import partial

import torch

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from stpredict.estimates.judging import Judging, plan_judging
from stpredict.estimates.tokenizing import Tokenizing, plan_tokenizing
from stpredict.forecasters.build_task import build_forecaster_task
from stpredict.forecasters.config import RecurrentConfig, UnitScaling
from stpredict.forecasters.scaling import Scaling
from stpredict.jobs.config import ForecasterJobConfig, PriorJobConfig, TokenizerJobConfig
from stpredict.priors.config import LatentConfig, TokenizedClipsConfig
from stpredict.priors.data import PlannedLatents
from stpredict.priors.task import PriorTask
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.tokenizers.task import TokenizerTask
from stpredict.training.task import Batch, Task

TrainConfig = TokenizerJobConfig | PriorJobConfig | ForecasterJobConfig


@dataclass(frozen=True)
class Planned:
    """``sample`` is one sample of a batch, on the meta device: a key and a tensor without its batch axis. A prior's is
    its tokens; where they are made in every step, ``tokenizing`` is what makes them, or None where that is not
    known. ``judging`` is what the model's work is judged by, beside plain errors."""

    config: TrainConfig
    task: Task
    sample: dict[str, torch.Tensor]
    tokenizing: Tokenizing | None = None
    judging: Judging | None = None

    @property
    def tokenizes(self) -> bool:
        """Whether a tokenizer runs in every step."""
        return isinstance(self.config, PriorJobConfig) and isinstance(self.config.data, TokenizedClipsConfig)

    def batch(self, size: int, device: str = "meta") -> Batch:
        """As the stream would give it to one rank."""
        return _batch(self.sample, size, device)


def plan_training(config: TrainConfig, tokenizer: tuple[CausalCnnConfig, ClipConfig] | None = None) -> Planned:
    """The model is not initialised: nothing is computed. ``tokenizer`` makes a prior's tokens in every step, of such
    clips. UsageError where the config leaves sizes open."""
    tokenizing = plan_tokenizing(*tokenizer, config.data.batch_size) if tokenizer else None
    with torch.device("meta"):
        match config:
            case TokenizerJobConfig():
                clip = config.data.clip
                task = TokenizerTask(config.model, config.loss, config.data, config.seed)
                sample = {"clip": torch.empty(clip.frames, *clip.size, clip.channels, dtype=torch.uint8)}
            case PriorJobConfig():
                latent = _latent(config)
                task = PriorTask(config.model, PlannedLatents(latent), None, 0, config.loss_from)
                sample = {"latent": torch.empty(latent.grid, dtype=torch.int64)}
                if task.prefixes:
                    sample["label"] = torch.empty((), dtype=torch.int64)
            case ForecasterJobConfig():
                channels = config.model.channels
                same = Scaling((0.0,) * channels, (1.0,) * channels)
                task = build_forecaster_task(config.model, config.loss, config.data, (same, same), config.seed)
                clip = config.data.clips(config.model).clip
                scaling = config.data.scaling
                video = channels in (1, 3) if scaling is None else isinstance(scaling, UnitScaling)
                dtype = torch.uint8 if video else torch.float32
                sample = {"clip": torch.empty(clip.frames, *clip.size, channels, dtype=dtype)}
                if any(task.model.drop_rates):
                    sample["kept"] = torch.empty(task.model.passes, len(task.model.drop_rates))
                if isinstance(config.model, RecurrentConfig):
                    sample["shown"] = torch.empty(config.model.output_frames - 1, dtype=torch.bool)
    judging = None
    if isinstance(config, TokenizerJobConfig):
        judging = plan_judging(config, task, partial(_batch, sample))
    return Planned(config, task, sample, tokenizing, judging)


def _batch(sample: dict[str, torch.Tensor], size: int, device: str) -> Batch:
    tensors = {name: one.new_empty(size, *one.shape, device=device) for name, one in sample.items()}
    return {"key": [str(number) for number in range(size)], **tensors}


def _latent(config: PriorJobConfig) -> LatentConfig:
    if config.latent:
        return config.latent
    raise UsageError(
        "how many tokens of how many codes the prior sees is not known yet: give latent.grid=[5,16,16] "
        "latent.codebook_size=64000"
    )
