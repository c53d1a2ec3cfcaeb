"""Blocks of one token with positions on one axis: the model is a LLaMA, by transformers' own."""

import pytest
import torch
import transformers

from data_pipeline.errors import UsageError
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.llama import llama_config, llama_weights, write_llama
from stpredict.priors.next_block import NextBlockPrior

GRID, CODES = (3, 4, 4), 50


def prior(**changes) -> NextBlockPrior:
    torch.manual_seed(0)
    size = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "block": (1, 1, 1), "rope_axes": 1, "dropout": 0.0}
    model = NextBlockPrior(NextBlockConfig(**size | changes), CODES, GRID)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_logits_and_gradients_are_a_llamas():
    ours = prior()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(ours)))
    llama.load_state_dict(llama_weights(ours))
    ids = torch.randint(CODES, (2, ours.order.tokens))
    logits, theirs = ours(ids), llama(ids[:, :-1]).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
    for found in (logits, theirs):
        torch.nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()).backward()
    # The gradients in their layout: those of a prior whose weights are ours.
    for (_, parameter), (name, gradient) in zip(
        sorted(llama.named_parameters()), sorted(gradients(ours).items()), strict=True
    ):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def gradients(model: NextBlockPrior) -> dict[str, torch.Tensor]:
    shadow = NextBlockPrior(model.config, CODES, GRID)
    for parameter, of_model in zip(shadow.parameters(), model.parameters(), strict=True):
        parameter.data = of_model.grad
    return llama_weights(shadow)


def test_what_is_written_is_read_by_from_pretrained_as_the_same_model(tmp_path):
    ours = prior().eval()
    write_llama(ours, tmp_path / "llama")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids = torch.randint(CODES, (1, ours.order.tokens))
    torch.testing.assert_close(llama(ids[:, :-1]).logits, ours(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block": (1, 1, 4)}, r"model.block is \[1, 1, 4\]"),
        ({"rope_axes": 3}, "model.rope_axes is 3"),
        ({"conditioning": {"kind": "none"}}, "model.conditioning.kind is none"),
    ],
)
def test_another_prior_is_refused_with_the_reason(changes, reason, tmp_path):
    with pytest.raises(UsageError, match=f"no LLaMA: {reason}"):
        write_llama(prior(**changes), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
