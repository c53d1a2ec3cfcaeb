"""From a training config to a DeepSpeed engine."""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import UsageError
from stpredict.training.compiled_op import CPU_ADAM, load_compiled_op
from stpredict.training.config import OptimizerConfig, TrainingConfig
from stpredict.training.pieces import make_contiguous
from stpredict.training.precision import GradScaler

# DeepSpeed 0.19 calls these two torch functions under their old names; nothing else is silenced.
for _name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.filterwarnings("ignore", message=f".*{_name}.*", category=FutureWarning)

log = logging.getLogger(__name__)


def deepspeed_config(training: TrainingConfig, dtype: torch.dtype, ranks: int, accumulation: int) -> dict:
    """DeepSpeed's own config: that of ``training.deepspeed``, and ours.

    ZeRO 1 to 3 compute with weights of ``dtype`` beside fp32 masters. ZeRO-0 has one set of weights: they stay in fp32,
    and autocast gives operations that gain by it copies in ``dtype``.
    """
    places = {"offload_optimizer": training.offload.optimizer, "offload_param": training.offload.parameters}
    offload = {name: {"device": place} for name, place in places.items() if place != "none"}
    low = None if dtype == torch.float32 else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    sharded = training.zero_stage > 0
    ours = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // (ranks * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip_norm or 0.0,
        "bf16": {"enabled": sharded and low == "bf16"},
        "fp16": {"enabled": sharded and low == "fp16"},
        "torch_autocast": {"enabled": not sharded and low is not None, "dtype": low or "fp32"},
        "data_types": {"grad_accum_dtype": training.accumulation_dtype},
        "communication_data_type": training.accumulation_dtype,
        "zero_optimization": {"stage": training.zero_stage, **offload},
        "zero_allow_untested_optimizer": True,  # torch's SGD: tests/distributed/test_adversary.py tests it
        "steps_per_print": 10**9,  # metrics are ours
    }
    return _merged(training.deepspeed, ours)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: _merged(below.get(key, {}), value) for key, value in above.items() if isinstance(value, Mapping)}
    return {**below, **above, **nested}


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Weight decay for matrices and convolutions; none for norms, biases and slopes (fewer than two axes)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, on_cpu: bool = False) -> torch.optim.Optimizer:
    """torch's fused Adam, or SGD; ``on_cpu`` DeepSpeed's, for weights that are there while the model is not."""
    if config.kind == "sgd":
        return torch.optim.SGD(parameter_groups(model, config), lr=config.lr)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    groups = parameter_groups(model, config)
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_compiled_op(CPU_ADAM)
        return DeepSpeedCPUAdam(groups, adamw_mode=config.kind == "adamw", **settings)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    return kind(groups, fused=True, **settings)


def build_engine(model: nn.Module, training: TrainingConfig, dtype: torch.dtype, ranks: int, accumulation: int):
    """The DeepSpeed engine around ``model``; its parameters and buffers are rank 0's. Buffers keep their types.

    UsageError where DeepSpeed refuses what ``training.deepspeed`` says, ValueError for a model that it cannot take.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime import torch_autocast

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if deepspeed.get_accelerator().device_name() == "cpu":
        load_compiled_op()  # before DeepSpeed does, which could wait for ever
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:  # DeepSpeed's flat groups are made of slices
            raise ValueError(f"parameter {name} has no axes, which DeepSpeed does not train: give it the shape (1,)")
    make_contiguous(model)
    deepspeed.init_distributed(torch.distributed.get_backend())
    optimizer = build_optimizer(model, training.optimizer, on_cpu=training.offload.optimizer == "cpu")
    config = deepspeed_config(training, dtype, ranks, accumulation)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (AssertionError, TypeError, ValueError) as error:
        if not training.deepspeed:
            raise
        raise UsageError(f"training.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    # It would make later engines of this process reduce gradients in their model's type.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if dtype == torch.float16:
        _scale_loss(engine, config["fp16"])
    # DeepSpeed broadcasts parameters only: running statistics and codebooks kept as buffers would differ.
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)
    return engine


def _scale_loss(engine, settings: Mapping[str, Any]) -> None:
    """The same settings of the loss scale at every stage, and overflows that are reported rather than raised."""
    if engine.torch_autocast_z0_gradscaler is None:
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # that steps are void is noticed by the learner
        return
    engine.torch_autocast_z0_gradscaler = GradScaler(
        device=engine.device.type,
        init_scale=2.0 ** settings.get("initial_scale_power", 16),
        growth_interval=settings.get("loss_scale_window", 1000),
    )
