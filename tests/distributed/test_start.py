"""The part of torchrun's store that belongs to one start of a group."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch.distributed as dist

from mmpretrain.distributed import _own_store
from tests import runs

WORLD_SIZE = 3


def have_changed(store: dist.Store, before: Mapping[str, bytes]) -> bool:
    return all(store.get(key) != value for key, value in before.items())


def test_a_start_shares_no_key_with_the_one_before() -> None:
    """Rank 0 comes last, so that the others read the name of the earlier start first."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def own_store(rank: int) -> dist.Store:
        client = dist.TCPStore("localhost", server.port, is_master=False)
        return _own_store(client, rank, WORLD_SIZE, 60.0)

    for start in ("first", "second"):
        before = {}
        if start == "second":
            old = server.get("mmpretrain/start").decode()
            before = {f"{old}/{rank}": server.get(f"{old}/{rank}") for rank in (1, 2)}
        with ThreadPoolExecutor(WORLD_SIZE) as pool:
            others = [pool.submit(own_store, rank) for rank in (1, 2)]
            # Until both have named themselves to the earlier rank 0, in vain.
            runs.poll(partial(have_changed, server, before), "names", lambda: True)
            stores = [own_store(0), *(other.result() for other in others)]
        assert not stores[1].check(["address"])
        stores[0].set("address", start)
        assert [store.get("address") for store in stores] == [start.encode()] * WORLD_SIZE
