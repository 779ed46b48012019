r"""Measure what opening many shards takes: seconds, and memory of a process.

    python -m analysis.benchmarks.open_shards [--shards 100000] [--samples 10000] [--output open_shards.json]

The shards are made: sparse tars of one size, with stored indexes of `--samples` samples of three members each. Tars and
indexes are hard links to a few files, so that the indexes are in the page cache; reading them from a disk comes on top.
`first read` is the time to find a sample of a shard whose index has not been loaded.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import held_bytes, one_line, write_record
from mmpretrain.data.shards import Shards, expand_shards
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=arguments.positive, default=100_000)
    parser.add_argument("--samples", type=arguments.positive, default=10_000, help="of each shard")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    print(one_line())
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), args.shards, args.samples)
        before, started = held_bytes("VmRSS"), time.perf_counter()
        shards = Shards(expand_shards(folder))
        opened = time.perf_counter()
        _ = shards.fingerprint
        named = time.perf_counter()
        held = held_bytes("VmRSS") - before
        shards.key(shards.num_samples // 2)
        read = time.perf_counter()
    figures = {
        "samples": shards.num_samples,
        "open_seconds": opened - started,
        "fingerprint_seconds": named - opened,
        "first_read_seconds": read - named,
        "memory_bytes": held,
    }
    print(
        f"{args.shards:,} shards of {args.samples:,} samples: opened in {figures['open_seconds']:.1f} s, fingerprint in "
        f"{figures['fingerprint_seconds']:.1f} s, first read in {1000 * figures['first_read_seconds']:.1f} ms, "
        f"{held / 2**20:,.0f} MiB"
    )
    write_record(args, figures=figures)


if __name__ == "__main__":
    main()
