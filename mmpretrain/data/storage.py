"""Bytes at (path, offset, size) of local files, through a few descriptors that all readers of a process share."""

import errno
import os
from functools import lru_cache

_OPEN_FILES = 32
_RETRIES = 3


class _File:
    """An open descriptor; it is closed when nobody holds it any more, for another thread may still read from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# One cache for the process: with one for each data set, their number would decide how many files are open. A forked
# process inherits it and may go on with it: `pread` moves no offset, and each process closes descriptors of its own.
_opened = lru_cache(maxsize=_OPEN_FILES)(_File)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes at `offset` of a file.

    An I/O error is no property of the sample: it is retried, then raised, and ends the run.
    Raises: OSError if the file cannot be opened or read, or ends before `offset + size`.
    """
    for attempt in range(_RETRIES):
        try:
            data = os.pread(_opened(path).descriptor, size, offset)
            if len(data) == size:
                return data
            raise OSError(errno.EIO, f"expected {size} bytes at offset {offset}, got {len(data)}", path)
        except OSError:
            _opened.cache_clear()
            if attempt == _RETRIES - 1:
                raise
    raise AssertionError("unreachable")
