"""Command `index`: build offset indexes of tars from WebDataset or img2dataset."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.pool import run_tasks
from mmpretrain.data.stored_index import store_index
from mmpretrain.data.tar_index import index_tar


@dataclass(frozen=True)
class IndexedTar:
    """Result for one tar: number of samples, CPU seconds of the scan, path of its index, and problems."""

    tar: str
    num_samples: int
    seconds: float
    index: str | None
    problems: list[str]


def index_tars(tars: Sequence[str], workers: int) -> list[IndexedTar]:
    """Scan tars and store their indexes, even where a valid index exists: a request to index does not trust it."""
    return list(run_tasks(_index_one, tars, workers, "indexing"))


def _index_one(tar: str) -> IndexedTar:
    started = time.process_time()
    try:
        if not os.path.isfile(tar):  # opening a pipe would block forever
            raise ValueError("expected a regular file")
        index = index_tar(tar)
    except (ValueError, OSError) as error:
        return IndexedTar(tar, 0, 0.0, None, [str(error)])
    seconds = time.process_time() - started
    stored = store_index(index, tar)
    problems = index.problems + ([] if index.num_samples else ["no sample in it"])
    return IndexedTar(tar, index.num_samples, seconds, str(stored) if stored else None, problems)
