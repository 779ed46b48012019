"""Bytes at (path, offset, size) of local files, through a few descriptors that all readers of a process share."""

import errno
import os
import stat
from functools import lru_cache

_OPEN_FILES = 32
_RETRIES = 3


class NotRegular(OSError):
    """A path is a FIFO, a device or a folder, where a regular file is expected."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file by. It waits for no writer of a FIFO.

    Raises: NotRegular; OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegular(errno.EINVAL, "not a regular file", os.fspath(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class _File:
    """An open descriptor; it is closed when nobody holds it any more, for another thread may still read from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# One cache for the process: with one for each data set, their number would decide how many files are open. A forked
# process inherits it and may go on with it: `pread` moves no offset, and each process closes descriptors of its own.
_opened = lru_cache(maxsize=_OPEN_FILES)(_File)


class FileChanged(OSError):
    """A file is not the one that was indexed."""


def read_range(path: str, offset: int, size: int, file_bytes: int, mtime_ns: int) -> bytes:
    """Exactly `size` bytes at `offset` of a file of `file_bytes` bytes that was last modified at `mtime_ns`.

    An I/O error is no property of the sample: it is retried, then raised, and ends the run.
    Raises: FileChanged if the file has another size or time of modification; OSError if it cannot be opened or read,
        or ends before `offset + size`.
    """
    for attempt in range(_RETRIES):
        try:
            descriptor = _opened(path).descriptor
            data = os.pread(descriptor, size, offset)
            now = os.fstat(descriptor)  # after the read, which an edit may have overtaken
            if (now.st_size, now.st_mtime_ns) != (file_bytes, mtime_ns):
                raise FileChanged(
                    f"{path} was changed or replaced while it was read: {now.st_size} bytes, modified at "
                    f"{now.st_mtime_ns} ns, indexed with {file_bytes} at {mtime_ns}; restore it and go on, or start a "
                    "new run on what it is now"
                )
            if len(data) == size:
                return data
            raise OSError(errno.EIO, f"expected {size} bytes at offset {offset}, got {len(data)}", path)
        except OSError:
            _opened.cache_clear()
            if attempt == _RETRIES - 1:
                raise
    raise AssertionError("unreachable")
