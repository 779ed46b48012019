from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(2)` is two gloo processes; started when first asked for, and kept."""
    pools: dict[int, Pool] = {}

    def of_size(world_size: int) -> Pool:
        if world_size not in pools:
            pools[world_size] = Pool(world_size)
        return pools[world_size]

    yield of_size
    for pool in pools.values():
        pool.close()
