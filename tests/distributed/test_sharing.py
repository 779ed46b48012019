"""Ranks of one machine open data once, and share what it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmpretrain.data.shards import Shards
from tests.distributed.pool import Pool
from tests.distributed.sharing import opened_shards, refused_sharing, shared_memory
from tests.tars import pairs, write_members


@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_does_not_grow_with_the_ranks(pool: Callable[[int], Pool], world_size: int) -> None:
    made, taken, totals = zip(*pool(world_size).run(shared_memory))
    assert made == (1,) + (0,) * (world_size - 1)
    assert set(totals) == {(1 << 26) // 8}
    assert 0.9 < sum(taken) < 1.5


def test_a_refusal_is_every_ranks(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(refused_sharing) == ["no tar matches"] * 2


def test_shards_are_opened_by_one_rank_and_read_by_all(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    groups = [["a", "b"], ["c"], ["d"]]
    paths = [str(write_members(tmp_path / f"{i}.tar", pairs(keys, b"jpeg"))) for i, keys in enumerate(groups)]
    alone = Shards(paths)
    expected = list("abcd"), str(alone.fingerprint), 4
    assert pool(2).run(opened_shards, paths) == [(3, *expected), (0, *expected)]
