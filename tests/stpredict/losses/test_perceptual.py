import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from stpredict.losses import vgg
from stpredict.losses.config import LpipsConfig, RandomFeaturesConfig
from stpredict.losses.perceptual import Lpips, feature_distance

#: torchvision's vgg16().features: the numbers of its convolutions, and their channels.
CONVOLUTIONS = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)},
    **{17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
}
BEFORE_POOLING = (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Made up, in the layout of torchvision's file, classifier included."""
    generator = torch.Generator().manual_seed(0)
    found = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, (width, out) in CONVOLUTIONS.items():
        scale = (2 / (9 * width)) ** 0.5
        found[f"features.{number}.weight"] = scale * torch.randn(out, width, 3, 3, generator=generator)
        found[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return found


@pytest.fixture(scope="module")
def heads() -> dict[str, torch.Tensor]:
    """Made up, in the layout of the lpips package's file."""
    generator = torch.Generator().manual_seed(1)
    widths = (64, 128, 256, 512, 512)
    return {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for n, w in enumerate(widths)}


@pytest.fixture(scope="module")
def config(weights, heads, tmp_path_factory) -> LpipsConfig:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(weights, folder / "vgg16.pth")
    torch.save(heads, folder / "heads.pth")
    return LpipsConfig(trunk=folder / "vgg16.pth", heads=folder / "heads.pth")


def written_out(weights: dict, heads: dict, image: np.ndarray, other: np.ndarray) -> float:
    """LPIPS of two images ``(3, h, w)`` in [-1, 1], in NumPy and float64."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    total = 0.0
    stages = []
    for x in (image, other):
        x = (x - shift[:, None, None]) / scale[:, None, None]
        found = []
        for number in CONVOLUTIONS:
            kernel = weights[f"features.{number}.weight"].double().numpy()
            around = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
            x = np.einsum("chwij,ocij->ohw", windows, kernel, optimize=True)
            x = np.maximum(x + weights[f"features.{number}.bias"].double().numpy()[:, None, None], 0)
            if number in BEFORE_POOLING:
                found.append(x / np.sqrt((x**2).sum(0)))
                c, h, w = x.shape
                x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).max((2, 4))
        stages.append(found)
    for number, (one, two) in enumerate(zip(*stages, strict=True)):
        head = heads[f"lin{number}.model.1.weight"].double().numpy()[0]
        total += ((one - two) ** 2 * head).sum(0).mean()
    return total


def test_lpips_is_the_papers_written_out_in_numpy(config, weights, heads):
    generator = torch.Generator().manual_seed(2)
    made, truth = 2 * torch.rand(2, 1, 3, 2, 32, 16, generator=generator) - 1
    found = Lpips(config)(made, truth)
    assert found.shape == (1, 2)
    for t in range(2):
        expected = written_out(weights, heads, *(video[0, :, t].double().numpy() for video in (made, truth)))
        assert found[0, t].item() == pytest.approx(expected, rel=1e-5)


def test_gradients_flow_into_what_is_made_alone_also_where_nothing_differs(config):
    network = Lpips(config)
    truth = torch.rand(1, 3, 1, 16, 16, requires_grad=True)
    made = truth.detach().clone().requires_grad_()
    network(made, truth).sum().backward()
    assert truth.grad is None
    assert not made.grad.any()
    other = torch.zeros(1, 3, 1, 16, 16, requires_grad=True)
    network(other, truth).sum().backward()
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_one_channel_is_grey(config):
    network = Lpips(config)
    made, truth = torch.rand(2, 1, 1, 1, 16, 16)
    torch.testing.assert_close(
        network(made, truth), network(made.expand(-1, 3, -1, -1, -1), truth.expand(1, 3, 1, 16, 16))
    )


def test_torchmetrics_heads_are_taken_by_default(config, weights, tmp_path):
    """And a trunk in safetensors."""
    save_file(weights, tmp_path / "vgg16.safetensors")
    network = Lpips(LpipsConfig(trunk=tmp_path / "vgg16.safetensors"))
    heads = network.heads.state_dict()
    assert [tuple(head.shape) for head in heads.values()] == [(1, w, 1, 1) for w in vgg.WIDTHS]
    assert all((head >= 0).all() and head.any() for head in heads.values())
    assert torch.equal(network.trunk.features["28"].weight, weights["features.28.weight"])


def test_building_one_draws_no_random_numbers(config):
    torch.manual_seed(0)
    Lpips(config)
    feature_distance(RandomFeaturesConfig(), 3)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))


def test_planned_on_the_meta_device_it_needs_no_weights():
    with torch.device("meta"):
        network = Lpips(LpipsConfig(trunk="nowhere.pth"))
        assert network(torch.empty(2, 3, 5, 32, 32), torch.empty(2, 3, 5, 32, 32)).shape == (2, 5)
    assert sum(p.numel() for p in network.trunk.parameters()) == 14_714_688


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda path: None, r"trunk: .*trunk\.pth is not there"),
        (lambda path: path.write_text("<html>"), r"trunk: .*cannot be read as weights: torch\.save wrote"),
        (lambda path: torch.save([1], path), "holds a list, not weights by name"),
        (lambda path: torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path), "features.0.bias is missing"),
        (
            lambda path: torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, path),
            r"features\.0\.weight is \(8, 3, 3, 3\), \(64, 3, 3, 3\) is needed",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path, broken, message):
    broken(tmp_path / "trunk.pth")
    with pytest.raises(UsageError, match=message) as error:
        Lpips(LpipsConfig(trunk=tmp_path / "trunk.pth"))
    assert "\n" not in str(error.value)


def test_without_a_network_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(vgg, "URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens
    with pytest.raises(
        UsageError, match=r"cannot be downloaded \(.*fetch .* elsewhere and give its path here, or take"
    ):
        Lpips(LpipsConfig())


def test_a_download_that_is_another_file_is_refused(monkeypatch, tmp_path):
    """A login page of the network's, say: the URL's name has the hash."""
    (tmp_path / "vgg16-397923af.pth").write_text("<html>")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(vgg, "URL", (tmp_path / "vgg16-397923af.pth").as_uri())
    with pytest.raises(UsageError, match=r"cannot be downloaded \(invalid hash value"):
        Lpips(LpipsConfig())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_random_features_are_a_distance_that_a_seed_decides(channels):
    network = feature_distance(RandomFeaturesConfig(seed=5), channels)
    made, truth = torch.rand(2, 2, channels, 3, 16, 12)
    assert network(made, truth).shape == (2, 3)
    assert (network(made, truth) > 0).all()
    assert not network(truth, truth).any()
    again, other = (feature_distance(RandomFeaturesConfig(seed=seed), channels) for seed in (5, 6))
    assert torch.equal(again(made, truth), network(made, truth))
    assert not torch.equal(other(made, truth), network(made, truth))


@pytest.mark.parametrize(
    ("network", "clip", "message"),
    [
        (LpipsConfig(), {"size": (8, 32)}, "LPIPS needs frames of 16x16 at least, clips have 8x32"),
        (RandomFeaturesConfig(channels=(8, 8, 8)), {"size": (2, 4)}, "3 scales need frames of 4x4 at least"),
    ],
)
def test_clips_that_it_cannot_look_at_are_refused(network, clip, message):
    with pytest.raises(UsageError, match=message):
        network.check_clip(ClipConfig(**clip), "loss.perceptual")
