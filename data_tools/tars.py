"""Opening of tars one by one, local or remote, for commands that read them in parallel."""

from collections.abc import Sequence

import braceexpand

from mmpretrain.data.open_shards import StorageOptions, cache_of
from mmpretrain.data.remote import check_address, is_remote
from mmpretrain.data.remote_shards import RemoteShards
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.shards import Shards, expand_shards


def remote_storage(index_dir: str | None = None, cache_dir: str | None = None) -> RemoteShards:
    """Return the storage of remote tars, as training opens them by default; `cache_dir` names another cache.

    Raises: ValueError if the address of the indexes holds credentials.
    """
    check_address(index_dir or "", "--index-dir")
    options = StorageOptions(cache_dir=cache_dir)
    return RemoteShards(cache_of(options), index_dir, options.storage_seconds)


def expand_tars(tars: Sequence[str]) -> list[str]:
    """Expand patterns of tars, all local or all remote. Raises: ValueError; Unreachable."""
    parts = [part for pattern in tars for part in braceexpand.braceexpand(pattern)]
    if not any(map(is_remote, parts)):
        return expand_shards(tars)
    if not all(map(is_remote, parts)):
        raise ValueError(f"tars {list(tars)}: local and remote ones together; expected one kind")
    return remote_storage().expand(parts, "tars")


def open_table(paths: Sequence[str], index_dir: str | None) -> ShardTable:
    """Find the number of samples and the digest of each tar; local tars without an index are indexed.

    Args:
        paths: expanded paths or addresses, all of one kind.
        index_dir: folder or address of the indexes; None: beside the tars.

    Raises: ValueError for a tar without samples, or a remote one whose number of samples is not known; errors of
        `open_index`; Unreachable.
    """
    if any(map(is_remote, paths)):
        return remote_storage(index_dir).open(paths)
    return ShardTable.open(paths, index_dir)[0]


def open_tar(path: str, index_dir: str | None, row: ShardTable | None = None, cache_dir: str | None = None) -> Shards:
    """Open one tar.

    Args:
        path: path or address of the tar.
        index_dir: folder or address of the indexes; None: beside the tars.
        row: table of this remote tar alone, so that its folder is not listed again; None for a local tar.
        cache_dir: folder of the cache of a remote tar; None: training's default.

    Raises: errors of `Shards`, and of `RemoteShards.load_index`.
    """
    if row is None:
        return Shards([path], index_dir)
    return Shards.shared(lambda: (row, {}), remote_storage(index_dir, cache_dir))


def remote_row(table: ShardTable, shard: int) -> ShardTable:
    """Return the table of one tar alone, to open it with `open_tar` in another process."""
    return ShardTable.of([table.paths[shard]], table.counts[shard : shard + 1], [table.digests[shard]])
