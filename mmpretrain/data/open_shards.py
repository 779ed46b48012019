"""Opening of sets of tars, local or remote, from the patterns of a configuration."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import braceexpand

from mmpretrain import files
from mmpretrain.data.cache import Cache
from mmpretrain.data.remote import check_address, is_remote
from mmpretrain.data.remote_shards import RemoteShards
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.shards import LocalShards, OnMissingShard, Shards, expand_shards
from mmpretrain.data.tar_index import TarIndex
from mmpretrain.errors import check_number


@dataclass
class StorageOptions:
    """How tars are found, fetched and kept."""

    index_dir: str | None = None
    """Folder or address of the indexes, which repeats the folders of the tars; null: they lie beside the tars."""
    cache_dir: str | None = None
    """Folder for the bytes of remote tars, shared by all runs of a machine; null: $XDG_CACHE_HOME/mmpretrain/shards."""
    cache_bytes: int = 32_000_000_000
    """Limit on the size of the cache, in bytes. Two windows of samples (2 x 16,384) should fit."""
    storage_seconds: float = 300.0
    """Time after which a remote request that fails again and again counts as failed."""
    on_missing_shard: OnMissingShard = OnMissingShard.fail
    """What to do about a shard that stays unreachable: fail (end the run), or replace (its samples, by others)."""


def cache_of(options: StorageOptions) -> Cache:
    """Return the cache of remote tars."""
    check_number("data.cache_bytes", options.cache_bytes, at_least=1)
    return Cache(options.cache_dir or files.user_cache("shards"), options.cache_bytes)


def open_shards(shards: str | Sequence[str], root: str | None, options: StorageOptions) -> Shards:
    """Open a set of tars on all processes. A collective.

    Args:
        shards: a path, address, folder, glob or brace pattern, or a list of them.
        root: folder or address of relative patterns.
        options: indexes and cache.

    Raises: ValueError if a pattern matches nothing or mixes local and remote tars; OSError; errors of `index_tar`.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    expanded = [part for pattern in patterns for part in braceexpand.braceexpand(pattern)]
    urls = [part if is_remote(part) else os.path.join(root or "", part) for part in expanded]
    remote = [url for url in urls if is_remote(url)]
    if not remote:
        return Shards.shared(
            lambda: ShardTable.open(expand_shards(shards, root), options.index_dir),
            LocalShards(options.index_dir),
            options.on_missing_shard,
        )
    if len(remote) < len(urls):
        raise ValueError(
            f"shards {patterns}: local and remote tars in one list; expected one kind, or sources of their own: "
            "data.train.<stream>.sources"
        )
    check_number("data.storage_seconds", options.storage_seconds, above=0)
    check_address(options.index_dir or "", "data.index_dir")
    storage = RemoteShards(cache_of(options), options.index_dir, options.storage_seconds)

    def opened() -> tuple[ShardTable, Mapping[int, TarIndex]]:
        return storage.open(storage.expand(urls)), {}

    return Shards.shared(opened, storage, options.on_missing_shard)
