"""Configs of how a step is computed: numbers, memory, and DeepSpeed's own settings. Torch-free.

Learning is the same whatever is chosen here, but for rounding.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from data_pipeline.config import Config

# Keys of DeepSpeed's config that are set from ours, and by which of ours.
OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.clip_norm",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16.enabled": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.accumulation_dtype",
    "communication_data_type": "training.accumulation_dtype",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "activation_checkpointing": "training.activation_checkpointing",
    "compile": "training.compile",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer": "training.offload.optimizer",
    "zero_optimization.cpu_offload": "training.offload.optimizer",
    "zero_optimization.offload_param": "training.offload.parameters",
    "zero_optimization.cpu_offload_param": "training.offload.parameters",
}
# What may be set besides: how DeepSpeed moves the same numbers, and what it tells about itself.
TUNABLE = {
    "zero_optimization": {
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "round_robin_gradients",
        "sub_group_size",
        "ignore_unused_parameters",
        *(
            f"{prefix}{name}"
            for prefix in ("", "stage3_")
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        ),
    },
    "fp16": {"initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale"},
}
WHOLE = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler")


def _check_deepspeed(settings: dict[str, Any]) -> dict[str, Any]:
    for key in _keys(settings):
        if ours := next((OURS[part] for part in (key, key.split(".")[0]) if part in OURS), None):
            raise ValueError(f"{key} is set by {ours}: remove it here")
        first, *rest = key.split(".")
        if first in WHOLE or (first in TUNABLE and rest and rest[0] in TUNABLE[first]):
            continue
        names = {name.split(".")[-1]: name for name in _tunable()}
        near = difflib.get_close_matches(key.split(".")[-1], names, n=1)
        hint = f"did you mean {names[near[0]]!r}?" if near else f"there are {', '.join(_tunable())}"
        raise ValueError(f"{key} is none of the settings that may be tuned here; {hint}")
    return settings


def _keys(settings: Mapping[str, Any]) -> Iterator[str]:
    """Dotted, two levels of them: deeper ones belong to settings that are passed on whole."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{below}" for below in value)
        else:
            yield name


def _tunable() -> list[str]:
    return [*(f"{name}.{key}" for name in TUNABLE for key in sorted(TUNABLE[name])), *WHOLE]


def _no_nvme(value: Any) -> Any:
    if value == "nvme":
        raise ValueError("nvme is not offered: a checkpoint is made of views of the state in memory; use cpu")
    return value


Place = Annotated[Literal["none", "cpu"], BeforeValidator(_no_nvme)]


class OffloadConfig(Config):
    """What is kept in the host's memory instead of the device's."""

    optimizer: Place = Field("none", description="fp32 weights and moments, updated by DeepSpeed's CPU Adam; ZeRO 1-3")
    parameters: Place = Field("none", description="the weights that are computed with, fetched as needed; ZeRO-3")


class ActivationCheckpointingConfig(Config):
    """What of the forward pass is computed again in the backward pass rather than kept.

    ``layers``: all of a layer but its input. ``selective``: all but what matrix products, convolutions and attention
    made.
    """

    policy: Literal["none", "layers", "selective"] = "none"
    every: int = Field(1, ge=1, description="1: of each layer; n: of every n-th")


#: DeepSpeed's own config, merged under what we set.
DeepSpeedSettings = Annotated[dict[str, Any], AfterValidator(_check_deepspeed)]
