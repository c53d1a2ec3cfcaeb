"""LPIPS with AlexNet against the paper written out in NumPy."""

import numpy as np
import pytest
import torch

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from stpredict.losses import alexnet
from stpredict.losses.config import LpipsConfig
from stpredict.losses.perceptual import Lpips

#: torchvision's alexnet().features: of each convolution its number, channels, kernel, stride and padding.
CONVOLUTIONS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
BEFORE_POOLING = (0, 3)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Made up, in the layout of torchvision's file, classifier included."""
    generator = torch.Generator().manual_seed(0)
    found = {"classifier.1.weight": torch.zeros(2, 2)}
    for number, (width, out, kernel, _, _) in CONVOLUTIONS.items():
        scale = (2 / (kernel**2 * width)) ** 0.5
        found[f"features.{number}.weight"] = scale * torch.randn(out, width, kernel, kernel, generator=generator)
        found[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return found


@pytest.fixture(scope="module")
def config(weights, tmp_path_factory) -> LpipsConfig:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(weights, path)
    return LpipsConfig(network="alexnet", trunk=path)


def written_out(weights: dict, heads: list[np.ndarray], *images: np.ndarray) -> float:
    """LPIPS of two images ``(3, h, w)`` in [-1, 1], in NumPy and float64."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    stages = []
    for x in images:
        x = (x - shift[:, None, None]) / scale[:, None, None]
        found = []
        for number, (_, _, size, stride, padding) in CONVOLUTIONS.items():
            kernel = weights[f"features.{number}.weight"].double().numpy()
            around = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
            windows = np.lib.stride_tricks.sliding_window_view(around, (size, size), axis=(1, 2))
            x = np.einsum("chwij,ocij->ohw", windows[:, ::stride, ::stride], kernel, optimize=True)
            x = np.maximum(x + weights[f"features.{number}.bias"].double().numpy()[:, None, None], 0)
            found.append(x / np.sqrt((x**2).sum(0)).clip(1e-30))
            if number in BEFORE_POOLING:
                x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((3, 4))
        stages.append(found)
    return sum(((a - b) ** 2 * head).sum(0).mean() for a, b, head in zip(*stages, heads, strict=True))


def test_lpips_with_alexnet_is_the_papers_written_out_in_numpy_with_torchmetrics_heads(config, weights):
    network = Lpips(config)
    heads = [head.double().numpy()[0] for head in network.heads.state_dict().values()]
    assert [head.shape for head in heads] == [(w, 1, 1) for w in (64, 192, 384, 256, 256)]
    generator = torch.Generator().manual_seed(2)
    made, truth = 2 * torch.rand(2, 1, 3, 2, 40, 31, generator=generator) - 1
    found = network(made, truth)
    for t in range(2):
        expected = written_out(weights, heads, *(video[0, :, t].double().numpy() for video in (made, truth)))
        assert found[0, t].item() == pytest.approx(expected, rel=1e-5)


def test_the_trunk_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = Lpips(LpipsConfig(network="alexnet"), "lpips")
    assert sum(p.numel() for p in network.trunk.parameters()) == 2_469_696


def test_the_smallest_frames_are_31x31(config):
    Lpips(config)(*torch.rand(2, 1, 3, 1, 31, 31))
    with pytest.raises(RuntimeError):
        Lpips(config)(*torch.rand(2, 1, 3, 1, 30, 31))
    with pytest.raises(UsageError, match="LPIPS needs frames of 31x31 at least"):
        config.check_clip(ClipConfig(size=(30, 64)), "lpips")


def test_without_weights_it_names_the_key_the_network_and_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(alexnet, "URL", "http://127.0.0.1:9/alexnet-owt-7be5be79.pth")  # nobody listens
    with pytest.raises(UsageError, match=r"lpips.trunk: AlexNet's weights cannot be downloaded \(.*fetch http"):
        Lpips(LpipsConfig(network="alexnet"), "lpips")


def test_configs_that_take_vgg16_are_what_they_were():
    assert "network" not in LpipsConfig().model_dump()
    assert LpipsConfig(network="alexnet").model_dump()["network"] == "alexnet"
