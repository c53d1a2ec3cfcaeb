"""What stands before a video: for each class, the tokens that say what it shows, and the null prefix."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.priors.config import ClassLabels, NextBlockConfig, TextTokens


@dataclass(frozen=True)
class Prefixes:
    """``ids`` (classes + 1, prefix) int64 and the ``lengths`` (classes + 1) that are real; the last is the null prefix,
    which samples without a class get too: their label is -1. ``classes`` names them."""

    classes: tuple[str, ...]
    ids: Tensor
    lengths: Tensor

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """``prefix`` and ``prefix_lengths`` of the prior's forward, for ``labels`` (b) int64."""
        ids, lengths = self.ids.to(labels.device), self.lengths.to(labels.device)
        return ids[labels], lengths[labels] if ids.shape[1] > 1 else None


def prefixes(config: NextBlockConfig, classes: Sequence[str]) -> Prefixes | None:
    """Of a prior of ``config`` and videos of ``classes``; None where it has none. UsageError where the tokenizer of
    texts cannot be read or has more ids than the config says."""
    match config.conditioning:
        case ClassLabels():
            ids = [[number] for number in range(len(classes) + 1)]
        case TextTokens() as text:
            tokenizer = _Texts(text)
            ids = [*(tokenizer.ids(in_words(name)) for name in classes), [text.vocabulary]]
        case _:
            return None
    rows = [row + [0] * (config.prefix - len(row)) for row in ids]
    lengths = [len(row) for row in ids]
    return Prefixes(tuple(classes), torch.tensor(rows, device="cpu"), torch.tensor(lengths, device="cpu"))


def planned_prefixes(config: NextBlockConfig, classes: int | None) -> Prefixes | None:
    """Of data that are not there yet, all of them empty: enough for what needs shapes alone. UsageError where it needs
    to know how many classes there are, and nothing says it."""
    if not config.labelled:
        return None
    if isinstance(config.conditioning, ClassLabels) and classes is None:
        raise UsageError("how many classes the videos have is not known yet: give latent.classes=101")
    names = tuple(str(number) for number in range(classes or 0))
    ids = torch.zeros(len(names) + 1, config.prefix, dtype=torch.int64, device="cpu")
    return Prefixes(names, ids, torch.ones(len(ids), dtype=torch.int64, device="cpu"))


def in_words(name: str) -> str:
    """A class's name as text: ApplyEyeMakeup and apply_eye_makeup are both "apply eye makeup"."""
    return re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)).strip().lower()


def text_tokenizer_hash(path: Path) -> str:
    """By which a prior knows its tokenizer of texts again. UsageError where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"model.conditioning.tokenizer: {path}: cannot be read: {error.strerror}") from error


class _Texts:
    def __init__(self, config: TextTokens):
        text_tokenizer_hash(config.tokenizer)  # says what is wrong with the file
        try:
            import tokenizers  # here, because few need it
        except ImportError:
            raise UsageError("model.conditioning.kind text needs tokenizers: pip install 'stpredict[text]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(config.tokenizer))
        except Exception as error:  # the library raises nothing more special
            raise UsageError(
                f"model.conditioning.tokenizer: {config.tokenizer}: is no tokenizer.json of the tokenizers library: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self._tokenizer.no_padding()  # a file may ask for it, and its padding would be seen
        # Ids may have gaps: the largest counts, not how many there are.
        self._tokens, most = config.tokens, max(self._tokenizer.get_vocab().values(), default=0) + 1
        if most > config.vocabulary:
            raise UsageError(
                f"model.conditioning.tokenizer: {config.tokenizer} has ids up to {most - 1}, "
                f"model.conditioning.vocabulary is {config.vocabulary}; set it to {most}, or give another file"
            )

    def ids(self, text: str) -> list[int]:
        found = self._tokenizer.encode(text).ids[: self._tokens]
        if not found:
            raise UsageError(f"model.conditioning.tokenizer: makes no token of the class {text!r}")
        return found
