"""Shards on disk: the same bytes for the same samples, each complete or absent, in a folder of one build."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from webdataset import TarWriter

from mmpretrain.data.tar_index import index_path, index_tar, write_index

JOURNAL = "building.json"  # there while a build is under way; it holds the build's plan
MANIFEST = "manifest.json"  # there when it is complete
_SHARD_NAME = re.compile(r"\d{6,}\.tar")


@dataclass(frozen=True)
class WrittenShard:
    """A shard as the manifest lists it; `digest` is its index's, `sha256` the whole file's (both hex)."""

    name: str
    num_samples: int
    tar_bytes: int
    digest: str
    sha256: str


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.tar"


def shard_bounds(num_samples: int, samples_per_shard: int) -> list[tuple[int, int]]:
    """First sample of each shard and the one after its last: shards of equal size, give or take one."""
    num_shards = max(1, -(-num_samples // samples_per_shard))
    return list(pairwise(num_samples * shard // num_shards for shard in range(num_shards + 1)))


def finish_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]], num_samples: int) -> WrittenShard:
    """Writes a shard, unless a killed build with the same plan has written all of it; then no sample is asked for.

    `samples` may turn out fewer than `num_samples`.
    """
    if path.exists() and (shard := describe_shard(path)).num_samples == num_samples:
        return shard
    return write_shard(path, samples)


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> WrittenShard:
    """Writes samples (`__key__`, bytes by extension) with webdataset, renames the tar into place, indexes it.

    Whatever the samples raise leaves no shard behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
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
    """Deletes a shard and its index, if they are there."""
    path.unlink(missing_ok=True)
    index_path(path).unlink(missing_ok=True)


def describe_shard(path: Path) -> WrittenShard:
    """Reads a shard back: indexes it and hashes its bytes."""
    index = index_tar(path)
    if index.problems:
        raise ValueError(f"{path}: {index.problems[0]}; delete its folder and build again")
    write_index(index, index_path(path))
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return WrittenShard(path.name, index.num_samples, index.tar_bytes, index.digest, sha256.hexdigest())


def check_output(output: Path) -> None:
    """Raises ValueError for a file, or a folder that holds tars that no build wrote."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {str(output)!r}: is a file; expected a folder, new or an earlier build's")
    tars = sorted(output.glob("*.tar"))
    if tars and not (output / JOURNAL).exists() and not (output / MANIFEST).exists():
        raise ValueError(f"--output {str(output)!r}: holds {tars[0].name}, which no build wrote; name another folder")


def open_output(output: Path, plan: str) -> None:
    """Readies a folder: shards of a killed build with the same plan stay, those of other builds go.

    Raises what `check_output` does.
    """
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    journal = output / JOURNAL
    if not journal.exists() or journal.read_text() != plan:
        write_atomically(journal, "")  # from here on the folder is an unfinished build, whose shards are not to be kept
        (output / MANIFEST).unlink(missing_ok=True)
        for tar in output.glob("*.tar"):
            if _SHARD_NAME.fullmatch(tar.name):
                delete_shard(tar)
        write_atomically(journal, plan)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink()


def close_output(output: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest, which says that the build is complete."""
    write_atomically(output / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (output / JOURNAL).unlink()


def write_refusals(output: Path, refusals: Iterable[str]) -> None:
    """Writes `refused.jsonl`: one JSON object for each row or document that was refused, in the input's order."""
    write_atomically(output / "refused.jsonl", (refusal + "\n" for refusal in refusals))


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Writes a UTF-8 text file, whole or in parts, beside itself and renames it into place.

    Lone surrogates, as in names of files that are not UTF-8, are written as JSON escapes them: `\\udcff`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(temporary, path)
