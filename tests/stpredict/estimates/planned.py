"""Trainings that are planned, and never made."""

from data_pipeline.config import ClipConfig, ClipDataConfig
from stpredict.estimates.planned import Planned, plan_training
from stpredict.jobs.config import ForecasterJobConfig, PriorJobConfig, TokenizerJobConfig

TRAINING = {"steps": 10, "batch_size": 4}


def planned_prior(
    grid: tuple[int, int, int] = (4, 8, 8), codebook_size: int = 64, training: dict | None = None, **model
) -> Planned:
    return plan_training(
        PriorJobConfig(
            run="(none)",
            tokenizer="(none)",
            data={"latents": "(none)"},
            latent={"grid": grid, "codebook_size": codebook_size},
            model=model,
            training={**TRAINING, **(training or {})},
        )
    )


def planned_tokenizer(
    frames: int = 9, size: tuple[int, int] = (32, 32), training: dict | None = None, loss: dict | None = None, **model
) -> Planned:
    return plan_training(
        TokenizerJobConfig(
            run="(none)",
            data=ClipDataConfig(shards="(none)", clip=ClipConfig(frames=frames, size=size)),
            model=model,
            loss=loss or {},
            training={**TRAINING, **(training or {})},
        )
    )


def planned_forecaster(training: dict | None = None, data: dict | None = None, **model) -> Planned:
    return plan_training(
        ForecasterJobConfig(
            run="(none)",
            data={"shards": "(none)", **(data or {})},
            model=SMALL_FORECASTER | model,
            training={**TRAINING, **(training or {})},
        )
    )


SMALL_PRIOR = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 192, "block": (1, 1, 8)}
SMALL_TOKENIZER = {
    "channels": (16, 32, 32),
    "blocks": (1, 1, 1),
    "middle_blocks": 1,
    "strides": ((1, 2, 2), (2, 2, 2)),
    "groups": 8,
}
SMALL_FORECASTER = {
    "kind": "simvp",
    "input_frames": 4,
    "output_frames": 4,
    "size": (16, 16),
    "hid_S": 8,
    "hid_T": 32,
    "N_S": 2,
    "N_T": 3,
}
