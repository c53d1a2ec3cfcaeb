from itertools import pairwise, product

import pytest
import torch
from torch import nn

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.layers.causal_conv import FrameGroupNorm
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig, TilingConfig
from stpredict.tokenizers.tiles import Tiles, encode_tiles, in_chunks

CONFIGS = {
    "published strides": CausalCnnConfig(
        channels=(8, 8, 8, 16), blocks=(1, 1, 0, 1), middle_blocks=1, groups=4, levels=(4, 4, 4)
    ),
    "patches": CausalCnnConfig(
        patch=2, channels=(8, 16, 16), blocks=(1, 1, 1), strides=((2, 2, 2), (2, 1, 1)), middle_blocks=1, groups=4
    ),
    "no strides in time": CausalCnnConfig(
        channels=(8, 8), blocks=(1, 1), strides=((1, 2, 2),), middle_blocks=0, groups=4, levels=(4, 4)
    ),
}
LATENT_FRAMES = 4


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def tokenizer(request) -> CausalCnnTokenizer:
    """In float64, norms and slopes not as they begin."""
    torch.manual_seed(0)
    model = CausalCnnTokenizer(CONFIGS[request.param]).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def plans(total: int) -> list[list[int]]:
    """Every way to cut ``total`` latent frames into chunks."""
    cuts = product((False, True), repeat=total - 1)
    return [[len(run) + 1 for run in "".join("x|"[cut] for cut in some).split("|")] for some in cuts]


def test_every_chunk_plan_encodes_and_decodes_as_all_at_once(tokenizer):
    t, s = tokenizer.config.temporal_factor, tokenizer.config.spatial_factor
    video = 2 * torch.rand(2, 3, 1 + t * (LATENT_FRAMES - 1), 2 * s, s, dtype=torch.float64) - 1
    z = tokenizer.encoder(video)
    whole, ids = tokenizer.decoder(z), tokenizer.quantize(z)[1]
    assert len(plans(LATENT_FRAMES)) == 8
    for plan in plans(LATENT_FRAMES):
        frames = [1 + t * (plan[0] - 1), *(t * count for count in plan[1:])]
        encoded = torch.cat([*in_chunks(tokenizer.encoder, video.split(frames, dim=2))], dim=2)
        assert (encoded - z).abs().max() < 1e-12, plan
        assert torch.equal(tokenizer.quantize(encoded)[1], ids)
        decoded = torch.cat([*in_chunks(tokenizer.decoder, z.split(plan, dim=2))], dim=2)
        assert decoded.shape == video.shape
        assert (decoded - whole).abs().max() < 1e-12, plan


def test_chunks_of_any_length_by_config(tokenizer):
    t, s = tokenizer.config.temporal_factor, tokenizer.config.spatial_factor
    video = 2 * torch.rand(1, 3, 1 + t * (LATENT_FRAMES - 1), s, s, dtype=torch.float64) - 1
    ids = tokenizer.encode(video)
    for frames in range(1, LATENT_FRAMES + 3):
        tiling = TilingConfig(latent_frames=frames)
        assert torch.equal(tokenizer.encode(video, tiling), ids)
        assert (tokenizer.decode(ids, tiling) - tokenizer.decode(ids)).abs().max() < 1e-12
    assert torch.equal(tokenizer.encode(video[:, :, :1], TilingConfig(latent_frames=2)), ids[:, :1])

    def seeing(part, past):
        seen.append(part.shape[2])
        return tokenizer.encoder(part, past)

    seen: list[int] = []
    encode_tiles(seeing, video, TilingConfig(latent_frames=2), tokenizer.config)
    assert seen == [1 + t, 2 * t]


@pytest.fixture(scope="module")
def without_norms() -> CausalCnnTokenizer:
    """Whose networks reach 11 pixels: the stem 1, two convolutions at full size 2, four at half size 8."""
    torch.manual_seed(0)
    config = CausalCnnConfig(
        channels=(4, 4), blocks=(1, 1), strides=((2, 2, 2),), middle_blocks=0, groups=4, levels=(4, 4)
    )
    model = CausalCnnTokenizer(config).double()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, FrameGroupNorm):
                setattr(module, name, nn.Identity())
    return model.requires_grad_(False)


@pytest.mark.parametrize("tile", [(56, 56), (52, 200)])
def test_but_for_norms_tiles_are_as_all_at_once(without_norms, tile):
    """Where a quarter of the overlap is as wide as the networks reach."""
    model, tiling = without_norms, TilingConfig(tile=tile, overlap=48, latent_frames=1)
    video = 2 * torch.rand(1, 3, 3, 70, 64, dtype=torch.float64) - 1
    assert len(Tiles(35, 32, 2, tiling).places) > 3
    ids = model.encode(video)
    assert torch.equal(model.encode(video, tiling), ids)
    assert (model.decode(ids, tiling) - model.decode(ids)).abs().max() < 1e-12
    nearer = tiling.model_copy(update={"overlap": 16})
    assert (model.decode(ids, nearer) - model.decode(ids)).abs().max() > 1e-6


def test_what_a_norm_makes_of_a_tile_passes_into_its_neighbours_without_a_step():
    """A norm takes another mean off each tile: side by side they differ by that, blended over half of the overlap."""
    ramp = torch.linspace(0, 1, 96, dtype=torch.float64).expand(1, 32, 96)

    def steps(overlap: int) -> torch.Tensor:
        tiles = Tiles(32, 96, 1, TilingConfig(tile=(32, 32), overlap=overlap))
        made = tiles.blended(lambda x: x - x.mean(dim=(-2, -1), keepdim=True), ramp, given=1, made=1)
        return (made - ramp).diff(dim=-1).abs()

    apart = 64 / 95 / 2  # of the means of neighbours that share nothing
    assert steps(0).max().item() == pytest.approx(apart)
    assert steps(16).max().item() <= apart / 8 * 1.01


def test_tiles_cover_the_grid_and_share_the_overlap():
    for side, size, overlap in product((1, 5, 12, 13, 31), (2, 5, 11), range(6)):
        if overlap >= size:
            continue
        tiles = Tiles(side, 3, 4, TilingConfig(tile=(4 * size, 400), overlap=4 * overlap))
        starts = [top for top, _ in tiles.places]
        assert starts[0] == 0
        assert starts[-1] + min(size, side) == side
        assert all(one + size - other >= overlap for one, other in pairwise(starts))
        assert len(starts) == 1 or (len(starts) - 1) * (size - overlap) + overlap < side  # one less would not do
        ones = tiles.blended(
            lambda x: x.repeat_interleave(4, -2).repeat_interleave(4, -1), torch.ones(1, side, 3), 1, 4
        )
        torch.testing.assert_close(ones, torch.ones(1, side * 4, 12))


def test_tilings_that_cannot_be_are_refused():
    for wrong, message in [
        ({"overlap": 8}, "give `tile` too"),
        ({"tile": [64, 32], "overlap": 32}, "overlap 32: tiles of 64x32 would not get on"),
    ]:
        with pytest.raises(UsageError, match=message):
            validate(TilingConfig, wrong, "encode.yaml")
    with pytest.raises(
        UsageError, match="tiling: 68 pixels: sides of tiles and their overlap have to be multiples of 8"
    ):
        TilingConfig(tile=(64, 68)).check(CausalCnnConfig(), "tiling")
    with pytest.raises(UsageError, match="tiling: 12 pixels: sides of tiles and their overlap"):
        TilingConfig(tile=(64, 64), overlap=12).check(CausalCnnConfig(), "tiling")


def test_tiles_share_a_quarter_of_themselves_unless_told_otherwise():
    assert Tiles(32, 32, 2, TilingConfig(tile=(32, 48))).overlap == 4
