"""Weights in the layout that NBP's authors publish, made up here."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.exports import find_export, fingerprint, load_tokenizer
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.jobs.import_weights import import_tokenizer
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.tokenizers.published import published_names
from tests.processes import succeeding

GROUPS, LEVELS = 2, (4, 4, 4)
MODEL = {
    "channels": [4, 8],
    "blocks": [1, 2],
    "strides": [[2, 2, 2]],
    "middle_blocks": 1,
    "groups": GROUPS,
    "levels": LEVELS,
}
#: The authors' layers of such a network: what each is, with its channels; strides of time, height and width.
ENCODER = [
    ("conv", 3, 4, (1, 1, 1)),
    ("residual", 4, 4),
    ("conv", 4, 4, (2, 2, 2)),
    ("residual", 4, 8),
    ("residual", 8, 8),
    ("residual", 8, 8),
    ("norm", 8),
    ("swish", 8),
    ("plain conv", 8, 3),
]
DECODER = [
    ("conv", 3, 8, (1, 1, 1)),
    ("residual", 8, 8),
    ("residual", 8, 8),
    ("residual", 8, 8),
    ("conv", 8, 64, (1, 1, 1)),
    ("depth to space",),
    ("residual", 8, 4),
    ("norm", 4),
    ("swish", 4),
    ("conv", 4, 3, (1, 1, 1)),
]


def made_up() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def conv(name: str, width: int, out: int, kernel: int = 3) -> dict[str, Tensor]:
        scale = (width * kernel**3) ** -0.5
        weight = scale * torch.randn(out, width, kernel, kernel, kernel, generator=generator)
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(out, generator=generator)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(width, generator=generator),
            f"{name}.bias": 0.1 * torch.randn(width, generator=generator),
        }

    def swish(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.beta": 1 + 0.1 * torch.randn(1, width, 1, 1, 1, generator=generator)}

    state = {}
    for folder, layers in (("encoder_layers", ENCODER), ("decoder_layers", DECODER)):
        for number, (kind, *sizes) in enumerate(layers):
            name = f"{folder}.{number}"
            match kind:
                case "conv":
                    state |= conv(f"{name}.conv", *sizes[:2])
                case "plain conv":
                    state |= conv(name, *sizes, kernel=1)
                case "norm":
                    state |= norm(name, *sizes)
                case "swish":
                    state |= swish(name, *sizes)
                case "residual":
                    width, out = sizes
                    state |= norm(f"{name}.fn.0", width) | swish(f"{name}.fn.1", width)
                    state |= conv(f"{name}.fn.2.conv", width, out)
                    state |= norm(f"{name}.fn.3", out) | swish(f"{name}.fn.4", out)
                    state |= conv(f"{name}.fn.5.conv", out, out)
                    if width != out:
                        state |= conv(f"{name}.residual_fn.0.conv", width, out, kernel=1)
    return state


def their_network(state: dict[str, Tensor], folder: str, layers: list[tuple], x: Tensor) -> Tensor:
    """Written out from their names alone, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def conv(name: str, x: Tensor, stride=(1, 1, 1)) -> Tensor:
        weight = state[f"{name}.weight"]
        past, side = weight.shape[2] - 1, weight.shape[3] // 2
        x = torch.cat([x[:, :, :1]] * past + [x], dim=2)
        x = F.pad(x, (side, side, side, side, 0, 0), mode="replicate")
        return F.conv3d(x, weight, state[f"{name}.bias"], stride)

    def norm(name: str, x: Tensor) -> Tensor:
        parameters = state[f"{name}.weight"], state[f"{name}.bias"]
        return torch.stack([F.group_norm(frame, GROUPS, *parameters) for frame in x.unbind(2)], dim=2)

    def swish(name: str, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-state[f"{name}.beta"] * x))

    for number, (kind, *sizes) in enumerate(layers):
        name = f"{folder}.{number}"
        match kind:
            case "conv":
                x = conv(f"{name}.conv", x, sizes[2])
            case "plain conv":
                x = conv(name, x)
            case "norm":
                x = norm(name, x)
            case "swish":
                x = swish(name, x)
            case "depth to space":
                b, c, t, h, w = x.shape
                x = x.view(b, 2, 2, 2, c // 8, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
                x = x.reshape(b, c // 8, 2 * t, 2 * h, 2 * w)[:, :, 1:]
            case "residual":
                h = conv(f"{name}.fn.2.conv", swish(f"{name}.fn.1", norm(f"{name}.fn.0", x)))
                h = conv(f"{name}.fn.5.conv", swish(f"{name}.fn.4", norm(f"{name}.fn.3", h)))
                x = h + (conv(f"{name}.residual_fn.0.conv", x) if sizes[0] != sizes[1] else x)
    return x


@pytest.fixture
def published(tmp_path) -> Path:
    """As their trainer saves it: behind DistributedDataParallel, with its settings pickled beside."""
    state = {f"module.{name}": tensor for name, tensor in made_up().items()}
    path = tmp_path / "nbp.pt"
    torch.save({"model_state_dict": state, "version": "0.1", "config": pickle.dumps({"image_size": 8})}, path)
    return path


def config(run: Path, **model) -> TokenizerJobConfig:
    clip = {"frames": 5, "size": [8, 8]}
    data = {"shards": "s", "clip": clip}
    job = {"run": run, "data": data, "model": MODEL | model, "training": {"steps": 1, "batch_size": 1}}
    return validate(TokenizerJobConfig, job, "config")


def test_an_import_computes_what_theirs_does_on_pixels_from_0_to_1(published, tmp_path):
    assert import_tokenizer(published, config(tmp_path / "run")) == tmp_path / "run" / "export"
    assert find_export(tmp_path / "run") == tmp_path / "run" / "export"
    model, export, _ = load_tokenizer(tmp_path / "run")
    assert (export.clip.frames, export.step) == (5, 0)
    modes = {path.stat().st_mode for path in (tmp_path / "run" / "export").iterdir()}
    assert len(modes) == 1  # whoever may read the config may read the weights
    model = model.double()
    video = torch.rand(2, 3, 5, 8, 8, dtype=torch.float64)
    z = their_network(made_up(), "encoder_layers", ENCODER, video)
    torch.testing.assert_close(model.encoder(2 * video - 1), z, atol=1e-6, rtol=0)
    codes, ids = model.quantize(z)
    assert torch.equal(model.encode(2 * video - 1), ids)
    reconstruction = their_network(made_up(), "decoder_layers", DECODER, codes.double())
    torch.testing.assert_close((model.decoder(codes.double()) + 1) / 2, reconstruction, atol=1e-6, rtol=0)


def test_names_at_the_published_size_are_those_of_their_lists():
    with torch.device("meta"):
        model = CausalCnnTokenizer(CausalCnnConfig())
    names = published_names(model)
    assert names.keys() == dict(model.named_parameters()).keys()
    assert len(set(names.values())) == len(names)
    numbers = {
        folder: sorted({int(name.split(".")[1]) for name in names.values() if name.startswith(folder)})
        for folder in ("encoder_layers", "decoder_layers")
    }
    assert numbers["encoder_layers"] == list(range(27))
    assert numbers["decoder_layers"] == [number for number in range(30) if number not in (10, 16, 22)]
    assert names["encoder.conv_out.weight"] == "encoder_layers.26.weight"
    assert names["decoder.conv_out.bias"] == "decoder_layers.29.conv.bias"
    shortcuts = [name for name in names.values() if name.endswith("residual_fn.0.conv.weight")]
    assert shortcuts == [f"encoder_layers.{n}.residual_fn.0.conv.weight" for n in (6, 16)] + [
        f"decoder_layers.{n}.residual_fn.0.conv.weight" for n in (11, 23)
    ]


def test_weights_of_another_network_are_refused_and_nothing_is_written(published, tmp_path):
    for model, message in [
        ({"middle_blocks": 2}, r"encoder_layers\.6\.fn\.0\.weight is missing"),
        ({"channels": [4, 4]}, r"encoder_layers\.3\.fn\.2\.conv\.weight is \(8, 4, 3, 3, 3\), \(4, 4, 3, 3, 3\) is"),
        ({"levels": [4, 4]}, r"encoder_layers\.8\.weight is \(3, 8, 1, 1, 1\), \(2, 8, 1, 1, 1\) is needed"),
    ]:
        with pytest.raises(UsageError, match=message):
            import_tokenizer(published, config(tmp_path / "run", **model))
        assert not (tmp_path / "run").exists()
    more = torch.load(published, weights_only=True)
    more["model_state_dict"]["module.discr.weight"] = torch.zeros(1)
    torch.save(more, published)
    with pytest.raises(UsageError, match=r"discr\.weight has no place in this network"):
        import_tokenizer(published, config(tmp_path / "run"))


def test_clips_that_the_network_cannot_take_are_refused(published, tmp_path):
    other = config(tmp_path / "run")
    clip = other.data.clip.model_copy(update={"size": (9, 8)})
    other = other.model_copy(update={"data": other.data.model_copy(update={"clip": clip})})
    with pytest.raises(UsageError, match=r"data\.clip: a clip of 5 frames of 9x8 does not fit this tokenizer"):
        import_tokenizer(published, other)


def test_what_is_no_run_of_an_import_is_not_overwritten(published, tmp_path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds other things than an export"):
        import_tokenizer(published, config(tmp_path / "run"))


def test_a_run_is_not_overwritten(published, tmp_path):
    Run(tmp_path / "run").update_status(kind="tokenizer", state="done")
    with pytest.raises(UsageError, match="holds a run; give the imported weights a place of their own"):
        import_tokenizer(published, config(tmp_path / "run"))


def test_the_command_says_where_it_is_and_does_it_again_alike(published, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"kind: tokenizer\nrun: {tmp_path / 'run'}\ndata: {{shards: s, clip: {{frames: 5, size: [8, 8]}}}}\n"
        f"model: {MODEL | {'levels': list(LEVELS)}}\ntraining: {{steps: 1, batch_size: 1}}\n".replace("'", "")
    )
    command = [sys.executable, "-m", "launcher", "import", str(published), str(path)]
    assert succeeding(command).stdout.strip() == str(tmp_path / "run" / "export")
    first = fingerprint(tmp_path / "run" / "export")
    assert import_tokenizer(published, config(tmp_path / "run")) == tmp_path / "run" / "export"
    assert fingerprint(tmp_path / "run" / "export") == first
