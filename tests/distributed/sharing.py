"""What ranks of one machine share; functions for the pool."""

import torch
from torch import Tensor

from analysis.benchmarks.machine import proportional_bytes
from mmpretrain import distributed
from mmpretrain.data import shard_table
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.shards import LocalShards, Shards
from mmpretrain.data.stored_index import open_index

_SHARED_BYTES = 1 << 26


def shared_memory() -> tuple[int, float, int]:
    """How often this rank made the tensors, the memory that it took as a multiple of their size, and their sum."""
    made = 0

    def make() -> dict[str, Tensor]:
        nonlocal made
        made += 1
        return {"a": torch.ones(_SHARED_BYTES // 8, dtype=torch.int64), "none": torch.zeros(0)}

    before = proportional_bytes()
    tensors = distributed.once_per_machine(make)
    total = int(tensors["a"].sum())
    distributed.gather_objects(None)  # all have read their pages
    taken = (proportional_bytes() - before) / _SHARED_BYTES
    distributed.gather_objects(None)
    return made, taken, total


def refused_sharing() -> str:
    """What this rank is told when rank 0 refuses."""

    def make() -> dict[str, Tensor]:
        assert distributed.is_main()
        raise ValueError("no tar matches")

    try:
        distributed.once_per_machine(make)
    except ValueError as error:
        return str(error)
    return "nothing"


def opened_shards(paths: list[str]) -> tuple[int, list[str], str, int]:
    """How many headers this rank read of shared shards, the keys of their samples, their fingerprint and one's bytes."""
    opened = []

    def counted(path: str, index_dir: str | None) -> object:
        opened.append(path)
        return open_index(path, index_dir)

    shard_table.open_index = counted  # type: ignore[assignment]
    try:
        shards = Shards.shared(lambda: ShardTable.open(paths), LocalShards())
    finally:
        shard_table.open_index = open_index
    keys = [shards.key(i) for i in range(shards.num_samples)]
    return len(opened), keys, str(shards.fingerprint), len(shards.read(0, ["jpg"]))
