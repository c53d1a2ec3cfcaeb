"""KEY.json, which stands beside every sample in a shard: read as what a stranger may have written. Torch-free."""

import json
from datetime import UTC, datetime
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


def minutes(about: dict[str, Any], frames: int) -> list[int]:
    """Of each of an array's frames since 1970: the first is at ``time`` (ISO text, UTC where it names no zone), each
    next one ``interval_h`` later, or all of them ``hours`` after the first. DecodeError where it says so in another
    way."""
    try:
        time = datetime.fromisoformat(about["time"])
        first = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() / 60
        hours = about.get("hours") or [about["interval_h"] * frame if frame else 0 for frame in range(frames)]
        found = [round(first + 60 * float(hour)) for hour in hours]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DecodeError(f"its .json is not as we write it: its times: {error!r}") from None
    if len(found) != frames:
        raise DecodeError(f"its .json is not as we write it: times of {len(found)} of {frames} frames")
    return found


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
