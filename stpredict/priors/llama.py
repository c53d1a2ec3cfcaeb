"""A prior whose block is one token and whose positions are numbers is a LLaMA: its weights in the layout of Hugging
Face's transformers, for whatever reads that."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior


def refuse_others(config: NextBlockConfig) -> None:
    """UsageError where a prior of ``config`` is no LLaMA."""
    if reason := _why_not(config):
        raise UsageError(f"--format hf-llama: this prior is no LLaMA: {reason}")


def _why_not(config: NextBlockConfig) -> str | None:
    if config.block != (1, 1, 1):
        return f"model.block is {list(config.block)}, not [1, 1, 1]"
    if config.rope_axes != 1:
        return "model.rope_axes is 3, not 1"
    if config.conditioning.kind != "frames":
        return f"model.conditioning.kind is {config.conditioning.kind}, not frames"
    return None


def llama_config(prior: NextBlockPrior) -> dict:
    """config.json of transformers' LlamaForCausalLM."""
    config = prior.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": prior.codebook_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": prior.order.tokens,
        "rms_norm_eps": prior.norm.eps,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,  # every id is a code
        "eos_token_id": None,
        "torch_dtype": str(prior.head.weight.dtype).removeprefix("torch."),
    }


def llama_weights(prior: NextBlockPrior) -> dict[str, Tensor]:
    """By the names of LlamaForCausalLM; matrices of ours that hold several of its are taken apart."""
    found = {
        "model.embed_tokens.weight": prior.embedding.weight,
        "model.norm.weight": prior.norm.weight,
        "lm_head.weight": prior.head.weight,
    }
    for number, layer in enumerate(prior.layers):
        q, k, v = layer.attention.qkv.weight.chunk(3)
        gate, up = layer.mlp.gate_up.weight.chunk(2)
        of_layer = {
            "input_layernorm": layer.attention_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attention.out.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down.weight,
        }
        found |= {f"model.layers.{number}.{name}.weight": weight for name, weight in of_layer.items()}
    return found


@torch.no_grad()
def write_llama(prior: NextBlockPrior, out: Path) -> None:
    """config.json and model.safetensors in the new folder ``out``. UsageError where the prior is no LLaMA."""
    refuse_others(prior.config)
    out.mkdir()
    weights = {name: weight.contiguous() for name, weight in llama_weights(prior).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(llama_config(prior), indent=1) + "\n")
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)  # safetensors lets nobody else read it
