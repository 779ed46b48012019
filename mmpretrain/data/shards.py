"""Sets of tars: random access to their samples by id."""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmpretrain.data.decode import BadSample
from mmpretrain.data.source import Fingerprint, check_field_size, expand_paths
from mmpretrain.data.storage import FileChanged, read_range
from mmpretrain.data.stored_index import cached_index_path, index_path, load_index
from mmpretrain.data.tar_headers import HEADER_BYTES, header_sum


def expand_shards(shards: str | Sequence[str], root: str | None = None) -> list[str]:
    """Expand patterns and folders to paths of tars; see `expand_paths`. Raises: ValueError."""
    return expand_paths(shards, root, "shards", "tar")


class Shards:
    """Random access to the samples of several tars, numbered in the order of `paths`; a `SampleSource`.

    Args:
        paths: paths of the tars.

    Raises: ValueError for a tar without samples; errors of `load_index`.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.indexes = [load_index(path) for path in self.paths]
        self.problems = [
            f"{path}: {problem}" for path, index in zip(self.paths, self.indexes) for problem in index.problems
        ]
        self.counts: npt.NDArray[np.int64] = np.array([index.num_samples for index in self.indexes], np.int64)
        for path, count in zip(self.paths, self.counts):
            if not count:
                raise ValueError(f"shard {path!r}: no sample in it, expected at least one; remove it or build it again")
        # bisect on a list: ten times faster than a scalar searchsorted
        self._ends: list[int] = np.cumsum(self.counts).tolist()

    @property
    def num_samples(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of each shard's base name, count and digest; independent of its folder."""
        identities = [
            json.dumps([os.path.basename(path), index.num_samples, index.digest]).encode() + b"\n"
            for path, index in zip(self.paths, self.indexes)
        ]
        return Fingerprint.of(self.paths, identities)

    def location(self, sample_id: int) -> str:
        """Return the path of the tar that has a sample. Raises: IndexError."""
        return self.paths[self._locate(sample_id)[0]]

    def key(self, sample_id: int) -> str:
        """Return the key of a sample. Raises: IndexError."""
        shard, row = self._locate(sample_id)
        return self.indexes[shard].key(row)

    def member(self, sample_id: int, fields: Sequence[str]) -> tuple[str, str, int, int] | None:
        """Return (path, extension, offset, size) of the first of `fields` that the sample has, or None.

        Raises: IndexError.
        """
        shard, row = self._locate(sample_id)
        members = self.indexes[shard].members
        for extension in fields:
            if extension in members:
                offsets, sizes = members[extension]
                if sizes[row] >= 0:
                    return self.paths[shard], extension, int(offsets[row]), int(sizes[row])
        return None

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the member of the first extension in `fields` that the sample has.

        Raises: IndexError; BadSample if the sample has none of the extensions, or the member exceeds 512 MiB for an
            image or 16 MiB for anything else; OSError if it cannot be read; FileChanged, an OSError that states the
            fix, if the tar has changed since it was indexed: its size, its modification time or the member's header
            differs. An edit of a member in place that preserves all three is not detected.
        """
        shard, row = self._locate(sample_id)
        member = self.member(sample_id, fields)
        if member is None:
            raise BadSample(f"it has no member {' or '.join(fields)}")
        path, extension, offset, size = member
        check_field_size(extension, size)
        index = self.indexes[shard]
        block = read_range(path, offset - HEADER_BYTES, HEADER_BYTES + size, index.tar_bytes, index.mtime_ns)
        if header_sum(block[:HEADER_BYTES]) != index.header_sums[extension][row]:
            raise FileChanged(
                f"{path} is not what its index says (another header at byte {offset - HEADER_BYTES}), though of the same "
                f"size and time of modification: remove {index_path(path)}, or {cached_index_path(path)}, and start again"
            )
        return block[HEADER_BYTES:]

    def _locate(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self.num_samples - 1}")
        shard = bisect_right(self._ends, sample_id)
        return shard, sample_id - (self._ends[shard - 1] if shard else 0)
