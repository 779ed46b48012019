"""Bytes at (url, offset, size). Local files now; a remote store is another class with the same `read`."""

import errno
import os
from collections import OrderedDict
from typing import Protocol

_OPEN_FILES = 256
_RETRIES = 3


class Storage(Protocol):
    """Where shards lie."""

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`. Raises: OSError when they cannot be had."""


class LocalStorage:
    """`pread` on local files, keeping a bounded number of them open; safe to use after a fork."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def _descriptor(self, url: str) -> int:
        if url in self._files:
            self._files.move_to_end(url)
            return self._files[url]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        descriptor = self._files[url] = os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of the file `url`.

        An I/O error is no property of the sample: it is retried, then raised, and ends the run.
        Raises: OSError if the file cannot be opened or read, or ends before `offset + size`.
        """
        for attempt in range(_RETRIES):
            try:
                data = os.pread(self._descriptor(url), size, offset)
                if len(data) == size:
                    return data
                raise OSError(errno.EIO, f"expected {size} bytes at offset {offset}, got {len(data)}", url)
            except OSError:
                if (descriptor := self._files.pop(url, None)) is not None:
                    os.close(descriptor)
                if attempt == _RETRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def __getstate__(self) -> dict[str, object]:
        return {"_files": OrderedDict()}
