"""Samples in Parquet files, with the bytes of their images."""

import hashlib
import json
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmpretrain.data.decode import BadSample
from mmpretrain.data.order import BLOCK_SIZE, WINDOW_BLOCKS
from mmpretrain.data.source import Fingerprint, expand_paths
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.table import Columns, missing

log = logging.getLogger(__name__)

_OPEN_FILES = 64
_READ_BYTES = 1 << 18
_BATCH_ROWS = 16 * BLOCK_SIZE
_SLOW_ROWS = 16 * BLOCK_SIZE
_SMALL_CHUNK = 1 << 22
"""Bytes of a column in a row group up to which it is kept in one piece, such as the column of captions."""
_MAX_PIECE = 1 << 30
"""Largest such piece of a source that is kept whole; an Arrow array of bytes holds less than 2 GiB."""

Block = tuple[int, int, str]
"""Row group, number of the block among all blocks of `BLOCK_SIZE` samples (-1: the whole row group), column."""


class ParquetSource:
    """Random access to the rows of Parquet files, numbered in the order of the files; a `SampleSource`.

    Parquet is read and decoded by row groups. Training visits blocks of 256 consecutive samples in a random order, 64
    blocks at a time (see `order.py`), so the blocks that were read last are kept in memory, column by column: about 16,384
    samples for each worker. Sources of up to a quarter of `cache_bytes` are kept whole; if row groups exceed 4,096 rows,
    sources of up to `cache_bytes`. Beyond that, each block costs the decoding of a part of its row group: write large data
    with `row_group_size=256`.

    Args:
        path: a file, a folder, a glob or brace pattern of .parquet files, or a list of them.
        root: folder of relative paths.
        image: column of the encoded images: bytes, or `{bytes, path}` as Hugging Face writes them; null: no images.
        caption: column of the captions, the field `txt`; null: none. Name a column of lists as `json.<column>`.
        label: column of the class indices, the field `cls`; null: none.
        key: column that names the samples; null: the file's name, with its folder if names occur twice, and the row's number.
        cache_bytes: memory for blocks, in bytes, of each process that reads.

    Raises: ValueError if a file is no Parquet, has no rows or lacks a column.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        root: str | None = None,
        image: str | None = "image",
        caption: str | None = "caption",
        label: str | None = None,
        key: str | None = None,
        cache_bytes: int = 1 << 31,
    ) -> None:
        self.paths = expand_paths(path, root, "path", "parquet")
        self._names = [os.path.basename(file).removesuffix(".parquet") for file in self.paths]
        if len(set(self._names)) < len(self._names):
            shared = os.path.commonpath(self.paths)
            self._names = [os.path.relpath(file, shared).removesuffix(".parquet") for file in self.paths]
        self._columns = Columns(image, caption, label, key)
        self._schemas: list[pa.Schema] = []
        self._states: list[tuple[int, int]] = []
        self._identities: list[bytes] = []
        self._groups: list[tuple[int, int]] = []
        """File of each row group, and its number in the file."""
        self._chunk_bytes: list[dict[str, int]] = []
        """Bytes of each column of each row group, uncompressed."""
        self._first_groups: list[int] = []
        sizes = []
        for i, file in enumerate(self.paths):
            metadata, schema, state, identity = _inspect(file)
            self._columns.check(schema, file)
            self._schemas.append(schema)
            self._states.append(state)
            self._identities.append(identity)
            self._first_groups.append(len(self._groups))
            for group in range(metadata.num_row_groups):
                self._groups.append((i, group))
                self._chunk_bytes.append(_chunk_bytes(metadata.row_group(group)))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends: list[int] = np.cumsum(sizes).tolist()
        num_bytes = sum(sum(chunks.values()) for chunks in self._chunk_bytes)
        self._is_kept_whole = num_bytes <= (cache_bytes if max(sizes) > _SLOW_ROWS else cache_bytes // 4)
        self._cache = _Cache(cache_bytes)
        if not self._is_kept_whole:
            largest = num_bytes if image is None else sum(chunks.get(image, 0) for chunks in self._chunk_bytes)
            _warn_if_slow(self.paths[0], largest / self.num_samples, self.num_samples, max(sizes), cache_bytes)

    @property
    def num_samples(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of each file's base name and footer, which has the sizes and statistics of all row groups.

        An edit in place that preserves them is not noticed. Rewriting the same rows in another layout counts as a change.
        """
        return Fingerprint.of(self.paths, self._identities)

    def location(self, sample_id: int) -> str:
        """Return the path of the sample's file. Raises: IndexError."""
        return self.paths[self._groups[self._locate(sample_id)[0]][0]]

    def key(self, sample_id: int) -> str:
        """Return the value of the column of keys, or `FILE:ROW`. Raises: IndexError."""
        group, _ = self._locate(sample_id)
        file = self._groups[group][0]
        if self._columns.key is not None:
            with suppress(BadSample, UnicodeDecodeError):  # a row without a key has its number
                return self._columns.encode(
                    "key", {self._columns.key: self._value(sample_id, self._columns.key)}
                ).decode()
        first_group = self._first_groups[file]
        first = self._ends[first_group - 1] if first_group else 0
        return f"{self._names[file]}:{sample_id - first}"

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the first of `fields` that the file has a column for.

        Raises: IndexError; BadSample if there is none, or its value is null, of an unsuitable type, too large or in a
            damaged part of the file; OSError if the file cannot be read; FileChanged, an OSError, if it has changed.
        """
        schema = self._schemas[self._groups[self._locate(sample_id)[0]][0]]
        for field in fields:
            if columns := self._columns.of(field, schema):
                return self._columns.encode(field, {column: self._value(sample_id, column) for column in columns})
        raise missing(fields, schema)

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """Return the row group among all row groups, and the row in it."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self.num_samples - 1}")
        group = bisect_right(self._ends, sample_id)
        return group, sample_id - (self._ends[group - 1] if group else 0)

    def _value(self, sample_id: int, column: str) -> pa.Scalar:
        group, row = self._locate(sample_id)
        start, end = sample_id - row, self._ends[group]
        block, first = -1, start
        chunk_bytes = self._chunk_bytes[group].get(column, 0)
        if end - start > BLOCK_SIZE and chunk_bytes > (_MAX_PIECE if self._is_kept_whole else _SMALL_CHUNK):
            block = sample_id // BLOCK_SIZE  # the order's blocks, so that one block there is one here
            first, end = max(start, block * BLOCK_SIZE), min(end, (block + 1) * BLOCK_SIZE)
        values = self._cache.get((group, block, column))
        if values is None:
            values = self._load(group, column, first - start, end - start)
            self._cache.put((group, block, column), values)
        return values[sample_id - first]

    def _load(self, group: int, column: str, first: int, end: int) -> pa.Array:
        """Decode rows `first` to `end` of a column of a row group."""
        i, own_group = self._groups[group]
        path = self.paths[i]
        self._check_unchanged(i)
        at, parts = 0, []
        try:
            file = _opened(path, self._states[i], os.getpid(), threading.get_ident())
            size = min(end - first, _BATCH_ROWS)
            # Batches are decoded one after another, so that rows behind the block cost nothing.
            for batch in file.iter_batches(size, row_groups=[own_group], columns=[column], use_threads=False):
                if at + len(batch) > first:
                    parts.append(_without_views(batch.column(0).slice(max(0, first - at), end - max(first, at))))
                at += len(batch)
                if at >= end:
                    break
            if at < end:
                raise BadSample(
                    f"row group {own_group} has {at} rows of column {column!r}; expected at least {end}", "column"
                )
            # A copy, since a slice would hold the memory of the whole batch.
            whole = pa.concat_arrays(parts) if len(parts) > 1 else parts[0].take(pa.array(np.arange(len(parts[0]))))
        except (pa.ArrowException, OSError) as error:
            # An error of the storage has a number, and one of the format has none.
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadSample(
                f"column {column!r} of row group {own_group} does not decode ({reason})", "column"
            ) from error
        self._check_unchanged(i)
        return whole

    def _check_unchanged(self, i: int) -> None:
        state = _state(self.paths[i])
        if state != self._states[i]:
            raise FileChanged(
                f"{self.paths[i]} was changed or replaced while it was read (size and time of modification {state}, at the "
                f"start {self._states[i]}); restore it and go on, or start a new run on the changed file"
            )


class _Cache:
    """Blocks of columns that were read last, up to a number of bytes. Results do not depend on it.

    Every operation is one of a dictionary, so that threads need no lock, which could be held while a worker is forked.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._blocks: OrderedDict[Block, pa.Array] = OrderedDict()

    def get(self, block: Block) -> pa.Array | None:
        values = self._blocks.get(block)
        if values is not None:
            with suppress(KeyError):  # another thread has just dropped it
                self._blocks.move_to_end(block)
        return values

    def put(self, block: Block, values: pa.Array) -> None:
        if (before := self._blocks.pop(block, None)) is not None:  # another thread has just decoded it, too
            self._num_bytes -= before.nbytes
        self._blocks[block] = values
        self._num_bytes += values.nbytes
        while self._num_bytes > self._max_bytes and len(self._blocks) > 1:
            with suppress(KeyError):
                self._num_bytes -= self._blocks.popitem(last=False)[1].nbytes


def _without_views(values: pa.Array) -> pa.Array:
    """Convert views of strings or bytes, which Arrow cannot copy row by row, to plain ones."""
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        return values.cast(pa.large_string() if pa.types.is_string_view(values.type) else pa.large_binary())
    return values


def _state(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _inspect(path: str) -> tuple[Any, pa.Schema, tuple[int, int], bytes]:
    """Return (metadata, schema, (size, modification time), identity) of a file. Raises: ValueError if it is unusable."""
    try:
        state = _state(path)
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        with open(path, "rb") as raw:
            raw.seek(-8, os.SEEK_END)
            footer_bytes = int.from_bytes(raw.read(4), "little")
            raw.seek(-8 - footer_bytes, os.SEEK_END)
            footer = hashlib.blake2b(raw.read(footer_bytes), digest_size=16).hexdigest()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable Parquet file ({reason})") from error
    if not metadata.num_rows:
        raise ValueError(f"{path}: no row in it, expected at least one; remove it or write it again")
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path}: names a column twice ({', '.join(schema.names)}); rename one")
    return metadata, schema, state, json.dumps([os.path.basename(path), state[0], footer]).encode() + b"\n"


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, state: tuple[int, int], process: int, thread: int) -> Any:
    """Return an open file. A process and a thread have their own, since a reader belongs to one thread."""
    return pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)


def _chunk_bytes(group: Any) -> dict[str, int]:
    """Return the uncompressed bytes of each column of a row group's metadata, with all values nested in it."""
    found: dict[str, int] = {}
    for i in range(group.num_columns):
        chunk = group.column(i)
        column = chunk.path_in_schema.split(".")[0]
        found[column] = found.get(column, 0) + chunk.total_uncompressed_size
    return found


def _warn_if_slow(path: str, sample_bytes: float, num_samples: int, most_rows: int, cache_bytes: int) -> None:
    """Warn if blocks would be decoded again and again."""
    window_bytes = int(sample_bytes * min(num_samples, BLOCK_SIZE * WINDOW_BLOCKS))
    if window_bytes > cache_bytes:
        log.warning(
            "%s and the others: the samples that are shuffled together take about %d MiB, more than cache_bytes (%d MiB), so "
            "that they are decoded again and again; raise it, as far as each worker has the memory: "
            "+data.train.<stream>.source.cache_bytes=...",
            path, window_bytes >> 20, cache_bytes >> 20,
        )  # fmt: skip
    if most_rows > _SLOW_ROWS:
        log.warning(
            "%s and the others: row groups have up to %d rows, of which each block of %d samples decodes a part anew; if "
            "loading is slow, write the files again with row_group_size=%d",
            path, most_rows, BLOCK_SIZE, BLOCK_SIZE,
        )  # fmt: skip
