"""Objects on https://, s3://, gs:// and the other file systems of fsspec: listings, sizes and ranges, with retries.

Credentials come from the environment, as each file system's library reads them (`AWS_ACCESS_KEY_ID`, `~/.netrc`,
`GOOGLE_APPLICATION_CREDENTIALS`, ...). Addresses that contain credentials are refused, since addresses are logged and saved.
"""

import asyncio
import errno
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_plus, urlsplit

import fsspec
from fsspec.asyn import sync

from mmpretrain.errors import Forbidden, Unreachable

Result = TypeVar("Result")

_SILENT_SECONDS = 20.0
"""Time without a byte after which a request is given up and repeated."""
_SLOWEST = float(1 << 20)
"""Bytes a second that the sending of a file is waited for at least, whatever the deadline."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 10.0
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(
    r"signature|token|credential|secret|passw|pwd|auth|(api|access|private|client|shared|account|subscription).?key"
    r"|(^|[-_.])(sig|key|pass|sas|jwt)$",
    re.IGNORECASE,
)
_MARKS = (
    "ETag", "etag", "LastModified", "Last-Modified", "Content-MD5", "Digest", "mtime", "generation",
)  # fmt: skip
"""What fsspec's file systems tell of an object that changes with its content; HTTP's are spelled as its headers."""
_PASSING_STATUS = (408, 425, 429)  # request timeout, too early, too many requests; and all of 500 and above
_PASSING_ERRORS = frozenset(
    (
        "ClientError", "HttpProcessingError", "HTTPClientError", "ConnectionError", "HttpError", "ResponseParserError",
        "RequestException",
    )
)  # fmt: skip
"""Names of the base classes of network errors in aiohttp, botocore, gcsfs and requests, which are optional here."""
_REFUSALS = frozenset(("BotoCoreError", "GoogleAuthError", "DefaultCredentialsError"))
"""Names of the base classes of errors before a request, such as missing credentials, in botocore and gcsfs."""
_LASTING = (
    errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR,
    errno.EROFS,
)  # fmt: skip
"""Errors of files on this machine that repeating does not mend."""

_logger = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    """Return True for an address with a scheme, such as `s3://bucket/key`."""
    return _SCHEME.match(path) is not None


def check_address(url: str, key: str) -> None:
    """Refuse an address that holds credentials. Raises: ValueError, without the credentials."""
    try:
        parts = urlsplit(url)
    except ValueError:  # whose message may tell a password
        raise ValueError(
            f"{key}: no valid address; expected one such as https://host/path or s3://bucket/path"
        ) from None
    names = re.findall(r"[&;?#]([^&;?#/=]+)=", f"{parts.path}?{parts.query}#{parts.fragment}")
    if "@" in parts.netloc:
        held = "a user or password"
    elif secret := next((name for name in map(unquote_plus, names) if _SECRET.search(name)), None):
        held = f"the parameter {secret!r}"
    else:
        return
    raise ValueError(
        f"{key}: the address on {parts.hostname} holds {held}, and addresses are logged and saved; expected credentials in "
        "the environment, such as AWS_ACCESS_KEY_ID or ~/.netrc"
    )


def check_parents(url: str) -> None:
    """Refuse an address with a part `..`, which would lead out of a folder of this machine. Raises: ValueError."""
    if ".." in url.split("/"):
        raise ValueError(f"{url} has a part '..'; expected an address without: name the tars, or another folder")


class Remote:
    """Remote objects, read with retries. Each call may come from any thread.

    A request that fails for a passing reason (a lost connection, a short body, a status of 429 or from 500 on, silence for 20
    seconds) is repeated after pauses of 0.1, 0.2, ... 10 seconds until the deadline. A missing object or a lack of permission
    ends the attempts at once.

    Args:
        deadline_seconds: time from the first attempt of a request after which its error is raised.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self.deadline_seconds = deadline_seconds

    def size(self, url: str) -> tuple[int, str]:
        """Return the size of an object in bytes, and a text that changes with its content as far as the server tells.

        Raises: Unreachable; FileNotFoundError.
        """
        info = self._patiently(url, lambda fs, path, seconds: _call(fs, "info", seconds, path))
        size = info.get("size")
        if not isinstance(size, int):
            raise Unreachable(f"{url}: the server does not tell its size; expected Content-Length")
        marks = {name: str(info[name]) for name in _MARKS if name in info}
        return size, json.dumps([size, marks], sort_keys=True)

    def read(self, url: str) -> bytes:
        """Return a whole object. Raises: Unreachable; FileNotFoundError."""
        content: bytes = self._patiently(url, lambda fs, path, seconds: _call(fs, "cat_file", seconds, path))
        return content

    def read_range(self, url: str, start: int, end: int) -> bytes:
        """Return the bytes `start` to `end` of an object. Raises: Unreachable; FileNotFoundError."""

        async def check(response: Any) -> None:
            found = response.headers.get("Content-Range", "")
            if response.status == 206 and found and not found.startswith(f"bytes {start}-"):
                raise Unreachable(
                    f"{url}: asked for bytes {start} to {end}, got {found}; expected a server that answers ranges"
                )

        def attempt(fs: Any, path: str, seconds: float) -> bytes:
            checked = {"raise_for_status": check} if "http" in fs.protocol else {}
            data: bytes = _call(fs, "cat_file", seconds, path, start=start, end=end, **checked)
            if len(data) > end - start:
                raise Unreachable(
                    f"{url}: asked for bytes {start} to {end}, got {len(data)} bytes; expected a server that answers ranges"
                )
            if len(data) < end - start:
                raise ConnectionError(f"{len(data)} bytes instead of {end - start} from byte {start} on")
            return data

        return self._patiently(url, attempt)

    def glob(self, pattern: str) -> list[str]:
        """Return the addresses that match a glob pattern, sorted. Raises: Unreachable; FileNotFoundError."""
        found = self._patiently(
            pattern,
            lambda fs, path, seconds: [fs.unstrip_protocol(each) for each in _call(fs, "glob", seconds, path)],
        )
        return sorted(found)

    def walk(self, folder: str) -> list[str]:
        """Return the addresses of all files under a folder, sorted; none if there is no such folder. Raises: Unreachable."""

        def attempt(fs: Any, path: str, seconds: float) -> list[str]:
            try:
                return sorted(fs.unstrip_protocol(each) for each in _call(fs, "find", seconds, path))
            except FileNotFoundError:
                return []

        return self._patiently(folder, attempt)

    def fetch(self, url: str, path: Path) -> None:
        """Copy an object to a file. Raises: Unreachable; FileNotFoundError."""
        self._patiently(url, lambda fs, place, seconds: _call(fs, "get_file", seconds, place, str(path)))

    def put(self, path: Path, url: str) -> None:
        """Copy a file as it is now to an object, which is replaced. Raises: Unreachable; FileNotFoundError."""

        def attempt(fs: Any, place: str, seconds: float) -> None:
            _make_parent(fs, place)
            _call(fs, "put_file", max(seconds, path.stat().st_size / _SLOWEST), str(path), place)

        self._patiently(url, attempt, "written")

    def write(self, url: str, content: bytes) -> None:
        """Write an object, which is replaced. Raises: Unreachable."""

        def attempt(fs: Any, place: str, seconds: float) -> None:
            _make_parent(fs, place)
            _call(fs, "pipe_file", seconds, place, content)

        self._patiently(url, attempt, "written")

    def remove(self, folder: str) -> None:
        """Remove a folder and what is in it, if it exists. Raises: Unreachable."""

        def attempt(fs: Any, path: str, seconds: float) -> None:
            with suppress(FileNotFoundError):
                _call(fs, "rm", seconds, path, recursive=True)

        self._patiently(folder, attempt, "removed")

    def _patiently(self, url: str, attempt: Callable[[Any, str, float], Result], done: str = "read") -> Result:
        """Call `attempt(file system, path, seconds left)` until it succeeds, fails for good, or the deadline is over."""
        began = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                fs, path = file_system(url)
                return attempt(fs, path, max(began + self.deadline_seconds - time.monotonic(), 0.001))
            except (Unreachable, ValueError, NotImplementedError):
                raise
            except Exception as error:  # each file system has exceptions of its own
                cause = _cause(error)
                if not _may_pass(cause):
                    if isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410):
                        raise FileNotFoundError(f"{url} does not exist") from error
                    if isinstance(cause, OSError) or _status(cause) or _is_of(cause, _REFUSALS):
                        kind = Forbidden if _status(cause) == 403 else Unreachable
                        raise kind(
                            f"{url} cannot be {done} ({_told(cause)}); check its address, its permissions and the "
                            "credentials in the environment"
                        ) from error
                    raise
                if time.monotonic() + pause > began + self.deadline_seconds:  # which may become shorter meanwhile
                    raise Unreachable(
                        f"{url} cannot be {done}, for {self.deadline_seconds:g} seconds (data.storage_seconds): "
                        f"{_told(cause)}"
                    ) from error
                _logger.debug("%s: %s; trying again in %g s", url, _told(cause), pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, one per process and kind, and the path in it.

    Raises: ValueError for an unknown scheme, or with the package to install.
    """
    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS)
            options["client_kwargs"] = {"trust_env": True, "timeout": timeout}  # proxies and ~/.netrc
        elif protocol in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": _SILENT_SECONDS,
                "read_timeout": _SILENT_SECONDS,
                "retries": {"max_attempts": 1},  # one place repeats requests: this module
            }
        fs = fsspec.filesystem(protocol, **options)
    except ValueError as error:  # fsspec knows no such protocol
        raise ValueError(f"{url}: {error}; expected an address such as https://, s3:// or gs://") from error
    except ImportError as error:
        raise ValueError(
            f"{protocol}:// needs a package that is not installed ({error}): pip install 'multimodal-pretrain[remote]'"
        ) from error
    return fs, fs._strip_protocol(f"{protocol}://{rest}")


def canonical(url: str) -> str:
    """Return an address as `Remote.walk` spells it, without a slash at its end: `gs://bucket/a` for `gcs://bucket/a/`.

    Raises: ValueError (see `file_system`).
    """
    fs, path = file_system(url)
    address: str = fs.unstrip_protocol(path).rstrip("/")
    return address


def _make_parent(fs: Any, path: str) -> None:
    """Make the folder of an object on a file system that has folders."""
    if not fs.async_impl:
        fs.makedirs(fs._parent(path), exist_ok=True)


def _call(fs: Any, method: str, seconds: float, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a file system, for at most `seconds` where the file system is asynchronous."""
    if fs.async_impl:
        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=seconds, **kwargs)
    return getattr(fs, method)(*args, **kwargs)


def _cause(error: BaseException) -> BaseException:
    """Return the error behind an error: fsspec reports any failure to find out a size as FileNotFoundError."""
    while error.__cause__ is not None and not isinstance(error, asyncio.TimeoutError):  # which a cancellation causes
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, botocore or gcsfs."""
    status = getattr(error, "code" if type(error).__name__ == "HttpError" else "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(str(status)) if str(status).isdigit() else None


def _may_pass(error: BaseException) -> bool:
    """Return True if a request that failed with this error may succeed later."""
    status = _status(error)
    if status is not None and status >= 400:
        return status in _PASSING_STATUS or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | shutil.SameFileError):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING:
        return False
    return _is_of(error, _PASSING_ERRORS) or isinstance(error, OSError | EOFError | asyncio.TimeoutError)


def _is_of(error: BaseException, names: Collection[str]) -> bool:
    """Return True if a class of this error, or of one that it derives from, has one of the names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _told(error: BaseException) -> str:
    """Return the first line of an error's message, with its class. Users, passwords and parameters are left out."""
    lines = str(error).splitlines() or [""]
    told = re.sub(r"//[^/\s]*@", "//", re.sub(r"[?#;][^ ]*", "", lines[0]))
    return f"{type(error).__name__}: {told}"[:300].rstrip(": ")
