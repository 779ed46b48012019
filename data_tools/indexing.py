"""Command `index`: build offset indexes of tars from WebDataset or img2dataset, and the tables of each folder's shards."""

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.output import write_atomically
from data_tools.pool import run_tasks
from data_tools.tars import expand_tars, remote_storage
from mmpretrain.data.remote import is_remote
from mmpretrain.data.stored_index import mirrored, store_index
from mmpretrain.data.tar_index import TarIndex, index_tar
from mmpretrain.files import read_json

TABLE = "shards.json"


@dataclass(frozen=True)
class IndexedTar:
    """Result for one tar: CPU seconds of the scan, number of samples, size, digest, path of its index, and problems."""

    tar: str
    seconds: float = 0.0
    num_samples: int = 0
    tar_bytes: int = 0
    digest: str = ""
    index: str | None = None
    problems: Sequence[str] = ()


def expand(tars: Sequence[str], index_dir: str | None) -> list[str]:
    """Expand patterns of local or remote tars. Raises: ValueError, also for remote tars without an `index_dir`."""
    if any(map(is_remote, tars)) and (index_dir is None or is_remote(index_dir)):
        given = "not given" if index_dir is None else "an address"  # which may hold a password
        raise ValueError(f"--index-dir is {given}; expected a local folder for the indexes of remote tars")
    return expand_tars(tars)


def index_tars(tars: Sequence[str], workers: int, index_dir: str | None = None) -> list[IndexedTar]:
    """Scan tars and store their indexes, even where a valid index exists: a request to index does not trust it.

    `shards.json`, in the folder of the indexes, lists the number of samples and the digest of each tar, so that remote copies
    open by one request. It keeps the entries of the folder's other tars.

    Args:
        tars: paths or addresses; remote tars are fetched whole.
        workers: number of processes.
        index_dir: folder of the indexes, which repeats the folders of the tars; None: beside the tars.

    Raises: ValueError if a folder holds a `shards.json` of something else.
    """
    for folder in dict.fromkeys(_index_folder(tar, index_dir) for tar in tars):
        _read_table(Path(folder) / TABLE)  # before the tars are scanned
    results = list(run_tasks(partial(_index_one, index_dir=index_dir), tars, workers, "indexing"))
    folders: dict[str, list[IndexedTar]] = defaultdict(list)
    for result in results:
        if result.index is not None and result.num_samples:
            folders[_index_folder(result.tar, index_dir)].append(result)
    for folder, indexed in folders.items():
        with suppress(PermissionError):  # the indexes are in the cache then, which serves this machine alone
            _write_table(Path(folder) / TABLE, indexed)
    return results


def _index_folder(tar: str, index_dir: str | None) -> str:
    return mirrored(tar.rpartition("/")[0] or ".", index_dir)


def _write_table(path: Path, indexed: Sequence[IndexedTar]) -> None:
    with _locked(path.with_name(f".{path.name}.lock")):
        rows = _read_table(path)
        for tar in indexed:
            name = tar.tar.rpartition("/")[2]
            figures = {"num_samples": tar.num_samples, "tar_bytes": tar.tar_bytes, "digest": tar.digest}
            rows[name] = {"name": name, **figures, "problems": list(tar.problems)}
        write_atomically(path, json.dumps({"shards": [rows[name] for name in sorted(rows)]}, indent=1) + "\n")


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a `shards.json` by name; none if it does not exist. Raises: ValueError for other content."""
    if not path.exists():
        return {}
    rows = read_json(path).get("shards")
    needed = {"name", "num_samples", "digest"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(
            f"{path}: expected a list `shards` of name, num_samples and digest, as index writes; move it away"
        )
    return {str(row["name"]): row for row in rows}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock file, hold it in the block, and delete it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:  # else the previous holder has deleted it
                try:
                    yield
                finally:
                    os.unlink(path)
                return
        finally:
            os.close(lock)


def _index_one(tar: str, index_dir: str | None) -> IndexedTar:
    started = time.process_time()
    try:
        index = _scan(tar)
    except (ValueError, OSError) as error:
        return IndexedTar(tar, problems=[str(error)])
    seconds = time.process_time() - started
    stored = store_index(index, tar, index_dir)
    problems = index.problems + ([] if index.num_samples else ["no sample in it"])
    place = str(stored) if stored else None
    return IndexedTar(tar, seconds, index.num_samples, index.tar_bytes, index.digest, place, problems)


def _scan(tar: str) -> TarIndex:
    if is_remote(tar):
        return remote_storage().load_index(tar, digest="")
    if not os.path.isfile(tar):  # opening a pipe would block forever
        raise ValueError("expected a regular file")
    return index_tar(tar)
