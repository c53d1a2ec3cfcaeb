"""Where shard sets are, and how their bytes are read: local paths, and s3://, gs:// and https:// by fsspec. Torch-free.

A location is text: a folder or file, a URL, or several in braces. Only the schemes of ``SCHEMES`` are read, and a
location is never handed to anything that could run it as a command or follow a chain of URLs. Credentials and
endpoints are those of the environment (``AWS_*``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``FSSPEC_*``, ``https_proxy``,
``SSL_CERT_FILE``). fsspec and its drivers are imported when the first URL is read.
"""

import gc
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from braceexpand import braceexpand

from data_pipeline.config import Location
from data_pipeline.errors import UsageError, UserError

log = logging.getLogger(__name__)

SCHEMES = ("", "file", "s3", "gs", "https")  # "" is a plain path
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}
_NOW_AND_THEN = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may be gone a moment later
_ATTEMPTS, _SECONDS = 4, 60.0  # of one request; no attempt begins after so many seconds
_PAUSE_S = 0.5  # before the second attempt; twice that before the third
_SILENCE_S = 30.0  # of an https server, then the attempt has failed

T = TypeVar("T")


def expand(location: Location | Path) -> list[str]:
    """``runs/part-{0..2}`` → the three locations it stands for; anything else → itself."""
    return list(braceexpand(str(location)))


def child(location: Location | Path, name: str) -> str:
    """The file or folder ``name`` in ``location``; braces stay as they are."""
    return f"{str(location).rstrip('/')}/{name}"


def scheme(location: Location | Path) -> str:
    """``s3`` of ``s3://bucket/set``; "" of a plain path, whose name may hold a colon if it exists or begins ./ or /."""
    text = str(location)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if not match:
        return ""
    begins_as_url = text.startswith("//", match.end())
    return match[1] if begins_as_url or not Path(text.split("/")[0]).exists() else ""


def is_local(location: Location | Path) -> bool:
    """Whether ``location`` is a path of this machine. UsageError as by ``check``."""
    return check(location) in ("", "file")


def check(location: Location | Path) -> str:
    """The scheme of ``location``. UsageError if it is not one that is read, or something else than a path follows."""
    text, kind = str(location), scheme(location)
    problem = None
    if kind not in SCHEMES:
        problem = f"{kind}: is not read"
    elif kind and not text.startswith(f"{kind}:///" if kind == "file" else f"{kind}://"):
        problem = f"{kind}: must be followed by {'///' if kind == 'file' else '//'}"
    elif kind and "::" in re.sub(r"//\[[0-9A-Fa-f:.]+\]", "//", text):  # but for the host of https://[::1]/
        problem = "chained URLs are not read"
    elif "|" in text and (kind or not (text.startswith(("/", "./")) or Path(text).exists())):
        problem = "commands are not run"
    if problem:
        allowed = ", ".join(f"{name}://" for name in SCHEMES if name)
        raise UsageError(f"{text}: {problem}; give a path (./NAME if it has a colon) or a URL of {allowed}")
    return kind


def read_text(location: Location | Path) -> str:
    """A small text file. Errors as of ``read_range``."""
    if is_local(location):
        with _local_errors(location):
            data = local_path(location).read_bytes()
    else:
        data = _request(location, lambda files: files.cat_file(str(location)))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: is not text ({error.reason} at byte {error.start}); make it again") from None


def size(location: Location | Path) -> int:
    """Of a file, in bytes. Errors as of ``read_range``."""
    if is_local(location):
        return local_path(location).stat().st_size
    try:
        found = _request(location, lambda files: files.size(str(location)))
    except FileNotFoundError:
        # fsspec calls every failure of a HEAD over https by this name: reading a byte tells the true one.
        read_range(location, 0, 1)
        raise
    if found is None:
        raise UserError(f"{location}: the server does not tell the size of its files; keep the set on another")
    return found


def read_range(location: Location | Path, offset: int, size: int) -> bytes:
    """At most ``size`` bytes from ``offset`` on: fewer where the file ends.

    FileNotFoundError where there is none; UsageError for a scheme that is not read or whose driver is not installed;
    UserError where disk, network or permissions are at fault, after several attempts where another may succeed.
    """
    if is_local(location):
        with _local_errors(location), local_path(location).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    if not size:
        return b""
    data = _request(location, lambda files: files.cat_file(str(location), start=offset, end=offset + size))
    if len(data) > size:
        raise UserError(f"{location}: the server answers a request for some bytes with the whole file; use another")
    return data


def local_path(location: Location | Path) -> Path:
    """Of a plain path or a file:// URL."""
    return Path(str(location).removeprefix("file://"))


@contextmanager
def _local_errors(location: Location | Path) -> Iterator[None]:
    """Those of a file that is there, as ours: its permissions, its disk, its server."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{location}: cannot be read: {error.strerror}; check disk and permissions") from error


def _request(location: Location | Path, ask: Callable[[Any], T]) -> T:
    """What ``ask`` gets from fsspec's file system for ``location``, with every error turned into one of ours."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential_jitter

    files = _file_system(location)
    attempts = Retrying(
        stop=stop_after_attempt(_ATTEMPTS) | stop_after_delay(_SECONDS),
        wait=wait_exponential_jitter(multiplier=_PAUSE_S, jitter=_PAUSE_S),
        retry=retry_if_exception(_may_pass),
        before_sleep=lambda state: log.warning("%s: %s; trying again", location, _reason(state.outcome.exception())),
        reraise=True,
    )
    try:
        return attempts(ask, files)
    except FileNotFoundError:
        raise FileNotFoundError(f"{location}: no such file") from None
    except Exception as error:  # each driver has types of its own
        if _status(error) == 416:  # the file ends before the range begins
            return b""
        raise UserError(
            f"{location}: cannot be read: {_reason(error)}; check address, network and permissions"
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed. s3fs and gcsfs have made theirs before they raise."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _NOW_AND_THEN
    lost = isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, ConnectionError))
    return lost and not isinstance(error, aiohttp.ClientConnectorCertificateError)


def _status(error: BaseException) -> int | None:
    """The HTTP status that ``error`` stands for: those of aiohttp, gcsfs and s3fs keep it in places of their own."""
    if (found := getattr(error, "status", None) or getattr(error, "code", None)) is not None:
        return found
    return getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _reason(error: BaseException) -> str:
    """In one line."""
    return " ".join((str(error) or type(error).__name__).split())


def _file_system(location: Location | Path) -> Any:
    """fsspec's, which are kept by scheme and process. UsageError if the driver is not installed."""
    kind = check(location)
    try:
        import fsspec

        # gcsfs would first ask for each bucket's kind by gRPC, which other endpoints than Google's do not answer.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        files = fsspec.filesystem(kind, **(_https_options() if kind == "https" else {}))
    except ImportError as error:
        package = _PACKAGES[kind]
        raise UsageError(f"{location}: {kind}:// needs a package that is not here: pip install {package}") from error
    _drivers_in_use.add(type(files))
    return files


@cache
def _https_options() -> dict[str, Any]:
    import aiohttp

    # No limit in all: a shard may take long. Compressed answers would make nonsense of byte ranges.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}


_drivers_in_use: set[type] = set()


def _close_connections() -> None:
    """Before a process forks, as it does for a DataLoader's workers: a copy of a connection that is closed by its
    finalizer breaks the original's. The next request opens a new one."""
    if _drivers_in_use:
        for driver in _drivers_in_use:
            driver.clear_instance_cache()
        _drivers_in_use.clear()
        gc.collect()  # fsspec's file systems refer to themselves, and are closed by being collected


os.register_at_fork(before=_close_connections)
