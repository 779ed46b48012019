"""Reading and writing of small files.

Reads are limited in size, and fail with a message of one line that names the file. Writes are atomic.
"""

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20
"""Size limit of JSON files, far above a state.json of a large optimiser, a results.json or a manifest.json."""

PARTIAL = ".partial-"
"""Prefix of the names of incomplete files."""
MAX_LIST_BYTES = 1 << 26
"""Limit on the size of lists that users write, such as names of classes."""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file. Symbolic links are followed.

    Raises: FileNotFoundError if there is no such file; ValueError if it is a pipe, device or folder, a circular link, or
        larger than `max_bytes`; OSError if it cannot be read, which does not mean that its content is invalid.
    """
    # Without O_NONBLOCK opening a pipe would wait for its other end.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link that leads to itself; expected the file as it was written") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file; expected the file as it was written, replace or remove it")
    with open(descriptor, "rb") as file:
        content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if max(status.st_size, len(content)) > max_bytes:
        raise ValueError(
            f"{path} has {max(status.st_size, len(content))} bytes; expected at most {max_bytes}, as it was written"
        )
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file with `read_bytes`.

    Raises: the errors of `read_bytes`; ValueError if the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); expected UTF-8") from None


def user_cache(name: str) -> Path:
    """Return the folder `name` of this program in the user's cache: $XDG_CACHE_HOME/mmpretrain, or ~/.cache/mmpretrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpretrain" / name


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that its content survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically: a reader sees the old or the new content, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small binary file atomically, like `write_text`."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with naming(path):
        partial.write_bytes(content)
        sync(partial)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError inside the block that names no file, such as one of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_all(file: io.RawIOBase, text: str | bytes) -> None:
    """Write all of a text to an unbuffered file, which may accept only a part per call.

    Since nothing is buffered, no write can fail later.

    Raises: OSError.
    """
    rest = memoryview(text.encode() if isinstance(text, str) else text)
    while rest:
        rest = rest[file.write(rest) :]


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON text.

    Raises: ValueError, with a message that begins with `where`, if the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); expected it as it was written") from None
    except RecursionError:
        raise ValueError(f"{where} nests too deep; expected JSON as it was written") from None
    except ValueError as error:  # bytes that are not UTF-8, or a number with thousands of digits
        raise ValueError(f"{where} cannot be read ({error}); expected JSON as it was written") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises: FileNotFoundError if there is no such file; ValueError if it is not a JSON object or exceeds the limits.
    """
    value = parse_json(read_text(path, max_bytes), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected keys with values, as it was written")
    return value
