import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig

TINY = CausalCnnConfig(
    patch=2, channels=(8, 16, 16), blocks=(1, 1, 1), strides=((2, 2, 2), (2, 1, 1)), middle_blocks=1, groups=4
)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def tokenizer() -> CausalCnnTokenizer:
    torch.manual_seed(0)
    return CausalCnnTokenizer(TINY).eval()


def test_published_size_to_the_parameter():
    with torch.device("meta"):
        model = CausalCnnTokenizer(CausalCnnConfig())
    assert parameters(model.encoder) == 144_886_790
    assert parameters(model.decoder) == 225_485_315
    assert parameters(model) == 370_372_105
    assert CausalCnnConfig().grid(17, 128, 128) == (5, 16, 16)
    assert CausalCnnConfig().codebook_size == 64_000


def test_shapes_through_encoder_and_decoder(tokenizer):
    video = torch.rand(2, 3, 9, 16, 8) * 2 - 1
    reconstruction, ids = tokenizer(4 * video)
    assert reconstruction.abs().max() > 1
    assert ids.shape == (2, *TINY.grid(9, 16, 8)) == (2, 3, 4, 2)
    assert reconstruction.shape == video.shape
    torch.testing.assert_close(tokenizer.decode(ids), reconstruction.clamp(-1, 1))


def test_later_frames_never_change_earlier_tokens_to_the_bit(tokenizer):
    video = torch.rand(1, 3, 9, 8, 8) * 2 - 1
    other = video.clone()
    other[:, :, 5:] = torch.rand(1, 3, 4, 8, 8)
    z, z_other = tokenizer.encoder(video), tokenizer.encoder(other)
    assert torch.equal(z[:, :, :2], z_other[:, :, :2])
    assert not torch.equal(z[:, :, 2:], z_other[:, :, 2:])
    # ... and frames 1 to 5 alone give the same first two latents.
    torch.testing.assert_close(tokenizer.encoder(video[:, :, :5]), z[:, :, :2])


def test_later_latents_never_change_earlier_frames(tokenizer):
    z = torch.randn(1, 6, 3, 4, 4)
    other = z.clone()
    other[:, :, 2:] += 1
    frames, frames_other = tokenizer.decoder(z), tokenizer.decoder(other)
    assert torch.equal(frames[:, :, :5], frames_other[:, :, :5])
    assert not torch.equal(frames[:, :, 5:], frames_other[:, :, 5:])


def test_an_image_is_a_clip_of_one_frame(tokenizer):
    assert tokenizer.encode(torch.rand(1, 3, 1, 8, 8)).shape == (1, 1, 2, 2)


def test_quantization_is_fp32_and_passes_gradients_under_bf16():
    model = CausalCnnTokenizer(TINY).bfloat16()
    reconstruction, ids = model(torch.rand(1, 3, 5, 8, 8))
    assert reconstruction.dtype == torch.bfloat16
    z = model.encoder(torch.rand(1, 3, 5, 8, 8))
    quantized, ids = model.quantize(z)
    assert quantized.dtype == torch.float32
    assert torch.equal(ids, model.quantize(z.float())[1])
    reconstruction.float().square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_codes_and_ids_are_inverse_over_the_whole_codebook():
    model = CausalCnnTokenizer(TINY.model_copy(update={"levels": (8, 5, 4)}))
    ids = torch.arange(160).view(1, 4, 5, 8)
    codes = model.quantizer.indices_to_codes(ids)
    assert len(torch.unique(codes.flatten(2)[0].T, dim=0)) == 160
    assert torch.equal(model.quantizer.codes_to_indices(codes.movedim(1, -1)).long(), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "multiple of groups"),
        ({"blocks": [1, 1]}, "3 channels need 3 entries in blocks"),
        ({"strides": [[2, 2, 2], [3, 1, 1]]}, "strides must be 1 or 2"),
        ({"levels": [8, 1]}, "key 'levels.1' is 1; give 2 or more"),
        ({"levels": []}, "key 'levels' is empty"),
    ],
)
def test_configs_that_do_not_fit_say_why(change, message):
    with pytest.raises(UsageError, match=message):
        validate(CausalCnnConfig, {**TINY.model_dump(), **change}, "model.yaml")


@pytest.mark.parametrize("sides", [(16, 128, 128), (17, 124, 128), (17, 128, 124)])
def test_a_clip_that_does_not_fit_says_which_do(sides):
    with pytest.raises(ValueError, match=r"1 \+ 4n frames and sides that are multiples of 8"):
        CausalCnnConfig().grid(*sides)


def test_a_decoder_may_have_other_blocks_than_the_encoder():
    with torch.device("meta"):
        model = CausalCnnTokenizer(TINY.model_copy(update={"decoder_blocks": (3, 0, 1)}))
    found = [[type(layer).__name__ for layer in half.stages] for half in (model.encoder, model.decoder)]
    assert found[0] == ["ResidualBlock", "CausalDownsample"] * 2 + ["ResidualBlock"]
    assert found[1] == ["ResidualBlock", "CausalUpsample", "CausalUpsample"] + ["ResidualBlock"] * 3
