"""KEY.json, which stands beside every sample in a shard: read as what a stranger may have written. Torch-free."""

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.decode import VideoInfo
from data_pipeline.errors import DecodeError

_INFO, _INFO_KEYS = TypeAdapter(VideoInfo), VideoInfo.__dataclass_fields__.keys()


def parse(text: bytes) -> dict[str, Any]:
    """Its keys and values. DecodeError where it is no mapping."""
    try:
        about = json.loads(text)
    except ValueError as error:
        raise DecodeError(f"its .json is damaged: {error}") from None
    if not isinstance(about, dict):
        raise DecodeError(f"its .json is damaged: a {type(about).__name__}, not a mapping")
    return about


def class_of(about: dict[str, Any]) -> int:
    """The number of the sample's class, -1 where it has none. DecodeError where it says nothing of it."""
    number = about.get("class")
    if type(number) is not int:
        raise DecodeError(f"its .json is not as we write it: class is {number!r}")
    return number


def video_info(about: dict[str, Any]) -> VideoInfo | None:
    """What ``probe`` found when the sample was written; None where that was not recorded. DecodeError where it is of
    another type."""
    if not about.keys() >= _INFO_KEYS:
        return None
    try:
        return _INFO.validate_python(about)
    except ValidationError as error:
        first = error.errors()[0]
        raise DecodeError(f"its .json is not as we write it: {first['loc'][0]}: {first['msg']}") from None
