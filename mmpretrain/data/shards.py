"""Sets of tars: random access to their samples by id."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.decode import BadSample
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.source import Fingerprint, check_field_size, expand_paths
from mmpretrain.data.storage import FileChanged, read_range
from mmpretrain.data.stored_index import cached_index_path, index_path, load_index
from mmpretrain.data.tar_headers import HEADER_BYTES, header_sum
from mmpretrain.data.tar_index import TarIndex

_KEPT_SAMPLES = 1 << 20
"""Samples of a set whose indexes are all kept: at some 70 bytes each, up to 70 MiB, which the workers share."""
_LOADED_SHARDS = 128
"""Indexes of a larger set that a process keeps. The order visits 64 blocks, of up to as many shards, at a time."""


def expand_shards(shards: str | Sequence[str], root: str | None = None) -> list[str]:
    """Expand patterns and folders to paths of tars; see `expand_paths`. Raises: ValueError."""
    return expand_paths(shards, root, "shards", "tar")


class Shards:
    """Random access to the samples of several tars, numbered in the order of `paths`; a `SampleSource`.

    Opening reads the headers of the stored indexes. The indexes of up to a million samples are loaded then, too; those of a
    larger set are loaded when a sample of their shard is read, and each process keeps the last 128.

    Args:
        paths: paths of the tars.

    Raises: ValueError for a tar without samples; errors of `load_index`.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._use(*ShardTable.open([os.fspath(path) for path in paths]))

    @classmethod
    def shared(cls, expand: Callable[[], Sequence[str]]) -> "Shards":
        """Open the same tars on all processes, reading their headers on one of each machine. A collective.

        Args:
            expand: function that returns the paths of the tars, such as `expand_shards` with its arguments. It is called on
                one process of each machine.

        Raises: as `Shards`; a ValueError or OSError of `expand`, on all processes.
        """
        unstored: dict[int, TarIndex] = {}

        def opened() -> dict[str, Tensor]:
            table, own = ShardTable.open(expand())
            unstored.update(own)
            return table.tensors()

        shards = cls.__new__(cls)
        shards._use(ShardTable.from_tensors(distributed.once_per_machine(opened)), unstored)
        return shards

    def _use(self, table: ShardTable, unstored: Mapping[int, TarIndex]) -> None:
        self._table = table
        self._ends: npt.NDArray[np.int64] = np.cumsum(table.counts)
        self._kept = dict(unstored)
        for shard in table.not_stored.tolist():
            self._kept.setdefault(shard, load_index(self.paths[shard]))
        self._loaded: OrderedDict[int, TarIndex] = OrderedDict()
        self._most_loaded = _LOADED_SHARDS
        if self.num_samples <= _KEPT_SAMPLES:
            # Loaded at once, before workers are forked, which then share them.
            self._most_loaded = len(self.paths)
            for shard in range(len(self.paths)):
                self.index(shard)

    @property
    def paths(self) -> Sequence[str]:
        """Paths of the tars."""
        return self._table.paths

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of samples of each tar, int64 [n]."""
        return self._table.counts

    @property
    def problems(self) -> list[str]:
        """Defects of the tars, each with its path."""
        return list(self._table.problems)

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of each shard's base name, count and digest; independent of its folder."""
        identities = [
            json.dumps([os.path.basename(path), count, digest]).encode() + b"\n"
            for path, count, digest in zip(self.paths, self.counts.tolist(), self._table.digests)
        ]
        return Fingerprint.of(self.paths, identities)

    def location(self, sample_id: int) -> str:
        """Return the path of the tar that has a sample. Raises: IndexError."""
        return self.paths[self._locate(sample_id)[0]]

    def key(self, sample_id: int) -> str:
        """Return the key of a sample. Raises: IndexError."""
        shard, row = self._locate(sample_id)
        return self.index(shard).key(row)

    def index(self, shard: int) -> TarIndex:
        """Return the index of a shard. Raises: FileChanged if it is another one than when the shards were opened."""
        if shard in self._kept:
            return self._kept[shard]
        index = self._loaded.get(shard)
        if index is None:
            path, count = self.paths[shard], int(self.counts[shard])
            index = load_index(path)
            if (index.num_samples, index.digest) != (count, self._table.digests[shard]):
                raise FileChanged(
                    f"{path} was changed or replaced while it was read (its index has {index.num_samples} samples, at the "
                    f"start {count}); restore it and go on, or start a new run on the changed file"
                )
            self._loaded[shard] = index
        # Single operations of a dictionary, so that threads need no lock, which could be held while a worker is forked.
        with suppress(KeyError):  # another thread has just dropped it
            self._loaded.move_to_end(shard)
            while len(self._loaded) > self._most_loaded:
                self._loaded.popitem(last=False)
        return index

    def member(self, sample_id: int, fields: Sequence[str]) -> tuple[str, str, int, int] | None:
        """Return (path, extension, offset, size) of the first of `fields` that the sample has, or None.

        Raises: IndexError.
        """
        shard, row = self._locate(sample_id)
        members = self.index(shard).members
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
        index = self.index(shard)
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
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, sample_id - (int(self._ends[shard - 1]) if shard else 0)
