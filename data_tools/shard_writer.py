"""Writing of shards, reproducible to the byte and atomic: a shard is complete or absent."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from webdataset import TarWriter

from mmpretrain.data.stored_index import index_path, write_index
from mmpretrain.data.tar_index import index_tar


@dataclass(frozen=True)
class WrittenShard:
    """Shard as listed in the manifest; `digest` is that of its index, `sha256` that of the whole file (both hex)."""

    name: str
    num_samples: int
    tar_bytes: int
    digest: str
    sha256: str


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.tar"


def shard_bounds(num_samples: int, samples_per_shard: int) -> list[tuple[int, int]]:
    """Return the first sample of each shard and the one after its last. Shard sizes differ by at most one sample."""
    num_shards = max(1, -(-num_samples // samples_per_shard))
    return list(pairwise(num_samples * shard // num_shards for shard in range(num_shards + 1)))


def finish_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]], num_samples: int) -> WrittenShard:
    """Write a shard, unless a killed build with the same plan has completed it; then no sample is drawn.

    `samples` may yield fewer than `num_samples`.
    """
    if path.exists() and (shard := describe_shard(path)).num_samples == num_samples:
        return shard
    return write_shard(path, samples)


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> WrittenShard:
    """Write samples (`__key__`, bytes by extension) with webdataset, rename the tar into place and index it.

    If the samples raise an error, no shard is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a leftover file, or a symbolic link
    try:
        with open(temporary, "xb") as file:
            with TarWriter(file, user="mmpretrain", group="mmpretrain", mtime=0, encoder=False) as writer:
                for sample in samples:
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return describe_shard(path)


def delete_shard(path: Path) -> None:
    """Delete a shard and its index, if they exist."""
    path.unlink(missing_ok=True)
    index_path(path).unlink(missing_ok=True)


def describe_shard(path: Path) -> WrittenShard:
    """Index a written shard and hash its bytes. Raises: ValueError if the tar has problems."""
    index = index_tar(path)
    if index.problems:
        raise ValueError(f"{path}: {index.problems[0]}; delete its folder and build again")
    write_index(index, index_path(path))
    return WrittenShard(path.name, index.num_samples, index.tar_bytes, index.digest, file_sha256(path))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()
