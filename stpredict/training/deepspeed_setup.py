"""From a training config to a DeepSpeed engine."""

import logging
import os
import warnings

import torch
from torch import nn

from stpredict.training.compiled_op import load_compiled_op
from stpredict.training.config import OptimizerConfig, TrainingConfig

# DeepSpeed 0.19 calls these two torch functions under their old names; nothing else is silenced.
for _name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.filterwarnings("ignore", message=f".*{_name}.*", category=FutureWarning)


def deepspeed_config(training: TrainingConfig, dtype: torch.dtype, ranks: int, accumulation: int) -> dict:
    """DeepSpeed's own config. Gradients are accumulated and reduced in fp32."""
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // (ranks * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": training.zero_stage},
        "steps_per_print": 10**9,  # metrics are ours
    }


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Weight decay for matrices and convolutions; none for norms, biases and slopes (fewer than two axes)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    groups = parameter_groups(model, config)
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def build_engine(model: nn.Module, training: TrainingConfig, dtype: torch.dtype, ranks: int, accumulation: int):
    """The DeepSpeed engine around ``model``; its parameters are rank 0's."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if deepspeed.get_accelerator().device_name() == "cpu":
        load_compiled_op()  # before DeepSpeed does, which could wait for ever
    deepspeed.init_distributed(torch.distributed.get_backend())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, training.optimizer),
        config=deepspeed_config(training, dtype, ranks, accumulation),
    )
    # DeepSpeed broadcasts parameters only: running statistics and codebooks kept as buffers would differ.
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)
    return engine
