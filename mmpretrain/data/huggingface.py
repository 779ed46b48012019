"""Samples of Hugging Face's `datasets`, as `Dataset.save_to_disk` writes them."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from mmpretrain.data.decode import BadSample
from mmpretrain.data.source import Fingerprint
from mmpretrain.data.storage import open_regular
from mmpretrain.data.table import Columns, missing

_SAMPLED_BYTES = 1 << 16


class DatasetSource:
    """Random access to the rows of a data set saved by `Dataset.save_to_disk`; a `SampleSource`.

    Its Arrow files are mapped into memory, and images are taken as encoded bytes. Needs the package `datasets`
    (`pip install multimodal-pretrain[datasets]`). The network is not used.

    Args:
        path: folder that `save_to_disk` wrote.
        root: folder of a relative path.
        split: split of a folder with several; null: the folder is one data set.
        image: column of the images (`datasets.Image`), or of their encoded bytes; null: no images.
        caption: column of the captions, the field `txt`; null: none. Name a column of lists as `json.<column>`.
        label: column of the class indices (such as `datasets.ClassLabel`), the field `cls`; null: none.
        key: column that names the samples; null: the row's number.

    Raises: ValueError if the folder is no saved data set, is empty, or lacks the split or a column.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        split: str | None = None,
        image: str | None = "image",
        caption: str | None = "caption",
        label: str | None = None,
        key: str | None = None,
    ) -> None:
        self._path = os.path.join(root or "", path)
        rows = _load(self._path, split)
        self._num_samples = len(rows)
        if not self._num_samples:
            raise ValueError(f"path is {self._path!r}, a data set without rows; expected at least one")
        self._schema: pa.Schema = rows.features.arrow_schema
        self._columns = Columns(image, caption, label, key)
        self._columns.check(self._schema, self._path)
        # One view of the rows for each column, so that a read touches that column alone.
        self._views = {column: rows.with_format("arrow", columns=[column]) for column in self._schema.names}
        self._files = [os.path.abspath(file["filename"]) for file in rows.cache_files]
        if not self._files:
            raise ValueError(f"path is {self._path!r}, a data set in memory; expected one that save_to_disk wrote")

    @property
    def num_samples(self) -> int:
        return self._num_samples

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of each file's base name, size, beginning, middle and end, and of the number of rows."""
        count = f"{self._num_samples}\n".encode()
        return Fingerprint.of(self._files, [_identity(file) + count for file in self._files])

    def location(self, sample_id: int) -> str:
        """Return the folder of the data set."""
        return self._path

    def key(self, sample_id: int) -> str:
        """Return the value of the column of keys, or the row's number. Raises: IndexError."""
        if self._columns.key is not None:
            with suppress(BadSample, UnicodeDecodeError):  # a row without a key has its number
                return self._columns.encode(
                    "key", {self._columns.key: self._value(sample_id, self._columns.key)}
                ).decode()
        return str(sample_id)

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the first of `fields` that the data set has a column for.

        Raises: IndexError; BadSample if there is none, or its value is null, of an unsuitable type or too large.
        """
        for field in fields:
            if columns := self._columns.of(field, self._schema):
                return self._columns.encode(field, {column: self._value(sample_id, column) for column in columns})
        raise missing(fields, self._schema)

    def _value(self, sample_id: int, column: str) -> pa.Scalar:
        if not 0 <= sample_id < self._num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self._num_samples - 1}")
        values = self._views[column][sample_id].column(0)
        try:
            values.validate(full=True)  # reading a damaged value could end the process
        except pa.ArrowInvalid as error:
            raise BadSample(f"its column {column!r} is damaged ({str(error).splitlines()[0]})", "column") from error
        return values[0]


def _load(path: str, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "the package datasets is missing; install it: pip install 'multimodal-pretrain[datasets]'"
        ) from error
    if not os.path.isdir(path):
        raise ValueError(f"path is {path!r}; expected an existing folder that save_to_disk wrote")
    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path is {path!r}, which cannot be loaded ({reason}); write it with save_to_disk") from error
    splits = list(loaded) if isinstance(loaded, datasets.DatasetDict) else []
    if (split is None) == bool(splits) or (split is not None and split not in splits):
        known = f"one of its splits: {', '.join(splits)}" if splits else "null, since it has no splits"
        raise ValueError(f"split is {split!r} for {path!r}; expected {known}")
    return loaded[split] if splits else loaded


def _identity(path: str) -> bytes:
    """Return bytes that change with a file's content: its base name, its size and a hash of three parts."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        digest = hashlib.blake2b(digest_size=16)
        for offset in (0, max(0, size // 2 - _SAMPLED_BYTES // 2), max(0, size - _SAMPLED_BYTES)):
            digest.update(os.pread(descriptor, _SAMPLED_BYTES, offset))
    finally:
        os.close(descriptor)
    return json.dumps([os.path.basename(path), size, digest.hexdigest()]).encode() + b"\n"
