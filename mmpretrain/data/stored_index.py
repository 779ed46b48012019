"""Indexes of tars, stored beside them.

A tar is scanned once. Its index, `NAME.tar.index.npz`, records the tar's size and modification time and is valid as
long as both agree. The tar itself stays as WebDataset or img2dataset wrote it.
"""

import hashlib
import io
import json
import logging
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mmpretrain import files
from mmpretrain.data.remote import check_parents, is_remote
from mmpretrain.data.storage import open_regular
from mmpretrain.data.tar_headers import HEADER_BYTES
from mmpretrain.data.tar_index import MAX_EXTENSIONS, TarIndex, index_tar

Found = TypeVar("Found", "IndexHeader", TarIndex)

INDEX_SUFFIX = ".index.npz"
_INDEX_VERSION = 4
_logger = logging.getLogger(__name__)


def index_path(tar: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a tar's index, used if it can be written: beside the tar, or under `index_dir` (`index_place`).

    Raises: ValueError if `index_dir` is an address.
    """
    if index_dir is not None and is_remote(os.fspath(index_dir)):
        raise ValueError(
            f"{os.fspath(tar)}: its index is written, but the folder of the indexes is an address; expected a folder of "
            "this machine: data.index_dir=..., or --index-dir"
        )
    return Path(index_place(os.fspath(tar), None if index_dir is None else os.fspath(index_dir)))


def index_place(tar: str, index_dir: str | None) -> str:
    """Return the path or address of the index of a tar, given by its path or address.

    Under `index_dir`, the folders of the tar are repeated: `DIR/bucket/train/000.tar.index.npz` for
    `s3://bucket/train/000.tar`, and `DIR/data/train/000.tar.index.npz` for `/data/train/000.tar`.
    """
    return mirrored(tar, index_dir) + INDEX_SUFFIX


def mirrored(path: str, index_dir: str | None) -> str:
    """Return the place under `index_dir` that stands for a path or address; the path itself without an `index_dir`.

    Raises: ValueError for an address with a part `..`, which would lead out of `index_dir`.
    """
    if index_dir is None:
        return path
    if is_remote(path):
        check_parents(path)
    place = path.partition("://")[2] if is_remote(path) else os.path.abspath(path)
    return f"{index_dir.rstrip('/')}/{place.lstrip('/')}"


def cached_index_path(tar: str | os.PathLike[str]) -> Path:
    """Return the path of a tar's index in `$XDG_CACHE_HOME/mmpretrain/indexes`, used if its folder is not writable."""
    name = hashlib.blake2b(os.path.abspath(tar).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return files.user_cache("indexes") / f"{name}.index.npz"


def write_index(index: TarIndex, path: str | os.PathLike[str]) -> None:
    """Write an index to a temporary file and rename it into place. Several processes may write it at once."""
    path = Path(path)
    header = {
        "version": _INDEX_VERSION,
        "extensions": list(index.members),
        "tar_bytes": index.tar_bytes,
        "mtime_ns": index.mtime_ns,
        "digest": index.digest,
        "problems": index.problems,
    }
    shape = (len(index.members), index.num_samples)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                key_blob=index.key_blob,
                key_ends=index.key_ends,
                offsets=np.array([offsets for offsets, _ in index.members.values()], np.int64).reshape(shape),
                sizes=np.array([sizes for _, sizes in index.members.values()], np.int64).reshape(shape),
                header_sums=np.array(list(index.header_sums.values()), np.uint32).reshape(shape),
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class IndexHeader:
    """The part of an index that does not grow with the number of samples; see `TarIndex`."""

    num_samples: int
    tar_bytes: int
    mtime_ns: int
    digest: str
    problems: list[str]


class OldIndex(ValueError):
    """The stored index has another version."""


def _most_index_bytes(tar_bytes: int) -> int:
    """Return an upper bound on the size of an index, in bytes, for a tar of `tar_bytes` bytes.

    A sample takes at least one block of the tar. In the index it takes 8 bytes, 20 per extension, its key and its
    problems. Keys and problems hold names from the tar, at most six bytes per byte as text.
    """
    return (1 << 20) + tar_bytes // HEADER_BYTES * (8 + 20 * MAX_EXTENSIONS) + 8 * tar_bytes


def read_index(path: str | os.PathLike[str], tar_bytes: int | None = None) -> TarIndex:
    """Read a stored index.

    No array larger than the file is allocated, and all values must be valid for a tar of the size that the index
    records.

    Args:
        path: path of the index.
        tar_bytes: size of the tar; an index too large for such a tar is not read. None skips this check.

    Raises: OSError (FileNotFoundError) if it cannot be opened; NotRegular if it is not a regular file; ValueError if it
        is not a valid index; OldIndex if it has another version.
    """
    with _opened(path, tar_bytes) as (archive, header):
        return _valid_index(
            header,
            _stored_array(archive, "key_blob", np.uint8, 1),
            _stored_array(archive, "key_ends", np.int64, 1),
            _stored_array(archive, "offsets", np.int64, 2),
            _stored_array(archive, "sizes", np.int64, 2),
            _stored_array(archive, "header_sums", np.uint32, 2),
        )


def read_header(path: str | os.PathLike[str], tar_bytes: int) -> IndexHeader:
    """Read the header of a stored index, and the number of its samples. The arrays are not read.

    Args, Raises: as in `read_index`.
    """
    with _opened(path, tar_bytes) as (archive, header):
        _check_header(header)
        with archive.open(_stored(archive, "key_ends")) as file:
            (num_samples,) = _array_shape(file, "key_ends", np.int64, 1)
        return IndexHeader(num_samples, header["tar_bytes"], header["mtime_ns"], header["digest"], header["problems"])


@contextmanager
def _opened(path: str | os.PathLike[str], tar_bytes: int | None) -> Iterator[tuple[zipfile.ZipFile, Mapping[str, Any]]]:
    """Open a stored index of the present version, and read its header. Errors inside the block become ValueError.

    Raises: as `read_index`.
    """
    with open(open_regular(path), "rb") as file:
        try:
            file_bytes = os.fstat(file.fileno()).st_size
            if tar_bytes is not None and file_bytes > _most_index_bytes(tar_bytes):
                raise ValueError(f"{file_bytes} bytes, too many for a tar of {tar_bytes}")
            with zipfile.ZipFile(file) as archive:
                if any(max(info.file_size, info.compress_size) > file_bytes for info in archive.infolist()):
                    raise ValueError(f"an array is larger than the file's {file_bytes} bytes")
                header = json.loads(_stored_array(archive, "header", np.uint8, 1).tobytes())
                if header["version"] != _INDEX_VERSION:
                    raise OldIndex(f"{path}: index of version {header['version']}, expected {_INDEX_VERSION}")
                yield archive, header
        except OldIndex:
            raise
        except Exception as error:  # zipfile, NumPy and json raise many exceptions, OSError among them
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(f"{path}: unusable index ({reason})") from error


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return the entry of an array. Raises: ValueError if it is compressed; KeyError."""
    info = archive.getinfo(f"{name}.npy")
    # The archive's directory states the size, which may be wrong; without compression, no more than the file is read.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    return info


def _array_shape(file: IO[bytes], name: str, dtype: npt.DTypeLike, num_dimensions: int) -> tuple[int, ...]:
    """Read the beginning of an array, and return its shape. Raises: ValueError for another type or number of dimensions."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not an array of format version 1.0")
    shape, fortran_order, found = np.lib.format.read_array_header_1_0(file)
    if found != dtype or fortran_order or len(shape) != num_dimensions:
        raise ValueError(f"{name} is {found} {shape}, expected {np.dtype(dtype)} of {num_dimensions} dimensions")
    return shape


def _stored_array(archive: zipfile.ZipFile, name: str, dtype: npt.DTypeLike, num_dimensions: int) -> npt.NDArray[Any]:
    """Return an array of an uncompressed .npz, without a copy. Raises: ValueError; errors of zipfile."""
    file = io.BytesIO(archive.read(_stored(archive, name)))
    shape, found = _array_shape(file, name, dtype, num_dimensions), np.dtype(dtype)
    data = file.getbuffer()[file.tell() :]
    if math.prod(shape) * found.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes for {shape} numbers")
    return np.frombuffer(data, found).reshape(shape)


def _valid_index(
    header: Mapping[str, Any],
    key_blob: npt.NDArray[np.uint8],
    key_ends: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    header_sums: npt.NDArray[np.uint32],
) -> TarIndex:
    """Return the index after checking that its parts are consistent with each other and with the tar's size.

    Raises: ValueError, KeyError or TypeError if they are not.
    """
    _check_header(header)
    extensions, tar_bytes = header["extensions"], header["tar_bytes"]
    if len(set(extensions)) < len(extensions) or not (
        offsets.shape == sizes.shape == header_sums.shape == (len(extensions), len(key_ends))
    ):
        raise ValueError(f"offsets {offsets.shape}, sizes {sizes.shape} for {len(key_ends)} keys of {extensions}")
    bounds = np.concatenate([[0], key_ends])
    if not (bounds[1:] > bounds[:-1]).all() or bounds[-1] != len(key_blob):
        raise ValueError("key_ends do not ascend to the end of key_blob")
    # Compare with tar_bytes - offsets, since offsets + sizes can overflow.
    inside = (sizes >= 0) & (offsets >= 512) & (offsets % 512 == 0) & (offsets <= tar_bytes)
    if not (inside & (sizes <= tar_bytes - offsets) | (sizes == -1)).all():
        raise ValueError(f"members outside of the tar's {tar_bytes} bytes")
    return TarIndex(
        key_blob=key_blob,
        key_ends=key_ends,
        members={extension: (offsets[i], sizes[i]) for i, extension in enumerate(extensions)},
        header_sums={extension: header_sums[i] for i, extension in enumerate(extensions)},
        tar_bytes=tar_bytes,
        mtime_ns=header["mtime_ns"],
        digest=header["digest"],
        problems=header["problems"],
    )


def _check_header(header: Mapping[str, Any]) -> None:
    """Raises: ValueError or KeyError if a value of an index's header is missing or has another type."""
    for texts in (header["extensions"], header["problems"], [header["digest"]]):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("extensions, problems and digest must be strings")
    if type(header["tar_bytes"]) is not int or type(header["mtime_ns"]) is not int:
        raise ValueError("tar_bytes and mtime_ns must be integers")


def open_index(tar: str | os.PathLike[str], index_dir: str | None = None) -> IndexHeader | TarIndex:
    """Return the header of a tar's stored index, as `load_index` finds or makes it; the whole index if it is not stored.

    Raises: ValueError if `index_dir` is an address; errors of `index_tar`.
    """
    found = _find(tar, read_header, index_dir)
    if found is not None:
        return found
    index = index_tar(tar)
    if store_index(index, tar, index_dir) is None:
        return index
    return IndexHeader(index.num_samples, index.tar_bytes, index.mtime_ns, index.digest, index.problems)


def load_index(tar: str | os.PathLike[str], index_dir: str | None = None) -> TarIndex:
    """Return a tar's stored index if it matches the tar's size and modification time; else build and store a new one.

    An unreadable or damaged index is rebuilt, with a warning. A warning is also logged if neither the tar's folder nor
    the cache is writable.

    Args:
        tar: path of the tar.
        index_dir: folder of the indexes; None: they lie beside the tars.

    Raises: ValueError if `index_dir` is an address; errors of `index_tar`.
    """
    found = _find(tar, read_index, index_dir)
    if found is None:
        found = index_tar(tar)
        store_index(found, tar, index_dir)
    return found


def _find(tar: str | os.PathLike[str], read: Callable[[Path, int], Found], index_dir: str | None) -> Found | None:
    """Read the stored index of a tar in its place or in the cache; None, with a warning if it is damaged, if none matches."""
    stat = os.stat(tar)
    for path in (index_path(tar, index_dir), cached_index_path(tar)):
        try:
            index = read(path, stat.st_size)
        except FileNotFoundError:
            continue
        except OldIndex as error:
            _logger.info("%s; it is made again", error)
            continue
        except OSError as error:
            _logger.warning("%s: the stored index cannot be read (%s); the tar is scanned", path, error.strerror)
            continue
        except ValueError as error:
            _logger.warning("%s; it is made again", error)
            continue
        if (index.tar_bytes, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    return None


def store_index(index: TarIndex, tar: str | os.PathLike[str], index_dir: str | None = None) -> Path | None:
    """Write a tar's index to its place (`index_path`), or else to the cache.

    Returns: the path of the index; None, with a warning, if neither is writable.
    """
    path = index_path(tar, index_dir)
    try:
        if index_dir is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_index(index, path)
        return path
    except OSError as beside:
        cached = cached_index_path(tar)
        _logger.info("%s: its index goes to the cache (%s)", tar, beside)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_index(index, cached)
            return cached
        except OSError as error:
            _logger.warning("%s: index not stored (%s; %s): it is scanned again every time", tar, beside, error)
            return None
