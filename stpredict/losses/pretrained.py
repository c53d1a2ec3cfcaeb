"""Networks that others trained, with the weights of a file or of a download."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from stpredict.foreign_weights import first_line, place, read_weights

Network = TypeVar("Network", bound=nn.Module)


def pretrained(make: Callable[[], Network], name: str, url: str, path: Path | None, key: str) -> Network:
    """``make()`` with the weights of ``path`` (others in it are ignored), else downloaded once, by torch.hub, from
    ``url``, whose name has the file's hash. UsageError, naming the config's ``key``, where they cannot be had or do not
    fit.

    On the meta device it has no weights. Nothing in it is trained.
    """
    planned = torch.empty(()).is_meta
    with torch.device("meta"):  # no random numbers are drawn for what is loaded
        model = make()
    if not planned:
        weights = read_weights(path, key) if path else _download(name, url, key)
        place(weights, model, f"{key}: {path or url}")
    return model.requires_grad_(False)


def _download(name: str, url: str, key: str) -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UsageError(
            f"{key}: {name}'s weights cannot be downloaded ({first_line(error)}): fetch {url} elsewhere and give its "
            "path here, or take loss.perceptual.network={kind: random_features}, which needs none"
        ) from None
