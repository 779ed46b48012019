r"""Measure what opening many shards takes on a machine: seconds, and memory of all its processes.

    python -m analysis.benchmarks.open_shards [--shards 100000] [--samples 10000] [--processes 1,2,4,8] [--output FILE]

The shards are made: sparse tars of one size, with stored indexes of `--samples` samples of three members each. Tars and
indexes are hard links to a few files, so that the indexes are in the page cache; reading them from a disk comes on top.
Memory is the sum over the processes of what opening added to each, pages that n processes share counting as an n-th (Linux's
Pss).
`first read` is the time to find a sample of a shard whose index has not been loaded.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import one_line, proportional_bytes, write_record
from analysis.benchmarks.ranks import on_ranks
from mmpretrain import distributed
from mmpretrain.data.open_shards import StorageOptions, open_shards
from mmpretrain.data.stored_index import index_path, write_index
from mmpretrain.data.tar_index import TarIndex

EXTENSIONS = ("jpg", "txt", "json")
KEY_BYTES = 9
MEMBER_BYTES = 1024
MOST_LINKS = 30_000  # a file of ext4 has up to 65,000


def make_index(num_samples: int, tar: os.stat_result) -> TarIndex:
    """Return an index of samples with one member of each extension."""
    keys = b"".join(b"%0*d" % (KEY_BYTES, i) for i in range(num_samples))
    offsets = np.arange(num_samples, dtype=np.int64) * len(EXTENSIONS) * MEMBER_BYTES + 512
    return TarIndex(
        key_blob=np.frombuffer(keys, np.uint8),
        key_ends=np.arange(1, num_samples + 1, dtype=np.int64) * KEY_BYTES,
        members={
            extension: (offsets + i * MEMBER_BYTES, np.full(num_samples, 500, np.int64))
            for i, extension in enumerate(EXTENSIONS)
        },
        header_sums={extension: np.zeros(num_samples, np.uint32) for extension in EXTENSIONS},
        tar_bytes=tar.st_size,
        mtime_ns=tar.st_mtime_ns,
        digest="0" * 64,
        problems=[],
    )


def make_shards(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write sparse tars and their indexes, most of them as links."""
    source = folder / "000000.tar"
    for i in range(num_shards):
        path = folder / f"{i:06d}.tar"
        if i % MOST_LINKS:
            os.link(source, path)
            os.link(index_path(source), index_path(path))
            continue
        source = path
        with open(source, "wb") as file:
            file.truncate((num_samples * len(EXTENSIONS) + 1) * MEMBER_BYTES)
        write_index(make_index(num_samples, os.stat(source)), index_path(source))


def measure(folder: str) -> dict[str, float]:
    """Open the shards on all processes, and return the figures of rank 0 and the memory of all."""
    gc.collect()  # it writes to all objects, so that a forked process gets pages of its own
    distributed.gather_objects(None)
    before, started = proportional_bytes(), time.perf_counter()
    shards = open_shards(folder, None, StorageOptions())
    opened = time.perf_counter()
    gc.collect()
    distributed.gather_objects(None)  # so that each sees what all share
    held = sum(distributed.gather_objects(proportional_bytes() - before))
    named = time.perf_counter()
    _ = shards.fingerprint
    found = time.perf_counter()
    shards.key(shards.num_samples // 2)
    read = time.perf_counter()
    return {
        "open_seconds": opened - started,
        "fingerprint_seconds": found - named,
        "first_read_seconds": read - found,
        "memory_bytes": held,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=arguments.positive, default=100_000)
    parser.add_argument("--samples", type=arguments.positive, default=10_000, help="of each shard")
    parser.add_argument("--processes", type=arguments.listed(arguments.positive), default=[1, 2, 4, 8])
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    print(f"{one_line()}\n{args.shards:,} shards of {args.samples:,} samples")
    print(f"{'processes':>9}{'open s':>10}{'fingerprint s':>15}{'first read ms':>15}{'memory MiB':>12}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), args.shards, args.samples)
        for processes in args.processes:
            row = figures[processes] = on_ranks(processes, "cpu", measure, folder)
            times = f"{row['open_seconds']:>10.1f}{row['fingerprint_seconds']:>15.2f}"
            print(
                f"{processes:>9}{times}{1000 * row['first_read_seconds']:>15.1f}{row['memory_bytes'] / 2**20:>12.1f}",
                flush=True,
            )
    write_record(args, figures=figures)


if __name__ == "__main__":
    main()
