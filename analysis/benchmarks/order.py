r"""Time and memory of finding a step's samples in data sets of 10^6 to 10^9 samples.

    python -m analysis.benchmarks.order [--samples 1e6,1e7,1e8,1e9] [--output order.json]

The order of samples is arithmetic (`mmpretrain.data.order`): nothing is shuffled in memory and no list of samples exists.
For each size a process of its own makes the order of one source in blocks of 256, asks for the first batch, for batches
at random places of the first 100 epochs, as resuming does, and for consecutive batches, as training does; the table has
medians of `--rounds` processes, and the process's peak memory beyond what it held before. Checked: two epochs of 10^6
samples hold each of them once, in two orders; in the larger sizes the drawn samples lie inside.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import one_line, peak_bytes, write_record
from mmpretrain.data.order import Order, SourceOrder, step_positions

BATCH_SIZE = 4096
EPOCHS = 100
NUM_CONSECUTIVE, NUM_RANDOM = 200, 8


def batch_at(order: Order, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch that begins at a position: positions and samples, int64 [BATCH_SIZE] each, in the order of reading."""
    ((positions, _, samples),) = step_positions(order, range(start, start + BATCH_SIZE), 0, 1, 1)
    return positions, samples


def check(num_samples: int) -> None:
    """Raises: SystemExit if one of two epochs does not hold every sample once, or both have one order."""
    order = Order([SourceOrder(1, num_samples)], [1.0])
    found = np.empty(2 * num_samples + BATCH_SIZE, dtype=np.int64)
    for start in range(0, 2 * num_samples, BATCH_SIZE):
        positions, samples = batch_at(order, start)
        found[positions] = samples
    first, second = found[:num_samples], found[num_samples : 2 * num_samples]
    everything = np.arange(num_samples)
    if not (np.array_equal(np.sort(first), everything) and np.array_equal(np.sort(second), everything)):
        raise SystemExit(f"an epoch of {num_samples} does not hold every sample once")
    if (first == second).mean() > 0.01:
        raise SystemExit("two epochs have one order")


def measure(num_samples: int) -> dict[str, float]:
    """In a process of its own: seconds, bytes beyond what was held before, and the least and most sample drawn."""
    places = np.random.default_rng(0).integers(0, EPOCHS * num_samples - BATCH_SIZE, NUM_RANDOM).tolist()
    with peak_bytes() as peak:
        started = time.perf_counter()
        order = Order([SourceOrder(1, num_samples)], [1.0])
        first = batch_at(order, 0)
        first_seconds = time.perf_counter() - started
        started = time.perf_counter()
        anywhere = [batch_at(order, place) for place in places]
        random_seconds = (time.perf_counter() - started) / NUM_RANDOM
        middle = places[0] // num_samples * num_samples
        started = time.perf_counter()
        following = [batch_at(order, middle + i * BATCH_SIZE) for i in range(NUM_CONSECUTIVE)]
        consecutive_seconds = (time.perf_counter() - started) / NUM_CONSECUTIVE
    drawn = np.concatenate([samples for _, samples in (first, *anywhere, *following)])
    return {
        "least": int(drawn.min()),
        "most": int(drawn.max()),
        "first": first_seconds,
        "random": random_seconds,
        "consecutive": consecutive_seconds,
        "bytes": peak[0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=arguments.listed(arguments.positive), default="1e6,1e7,1e8,1e9")
    parser.add_argument("--rounds", type=arguments.positive, default=5)
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    check(10**6)
    print(one_line())
    print(
        f"batch {BATCH_SIZE}, medians of {args.rounds}; each of two epochs of 10^6 held every sample once, in its own order"
    )
    print(f"{'samples':>14}{'first batch':>14}{'random batch':>14}{'next batch':>14}{'memory':>12}")
    medians: dict[str, dict[str, float]] = {}
    for size in args.samples:
        # Forked: nothing here has run a thread, and importing takes longer than measuring.
        context = multiprocessing.get_context("fork")
        rounds = []
        for _ in range(args.rounds):
            with ProcessPoolExecutor(1, mp_context=context) as pool:  # which says so if its process is killed
                rounds.append(pool.submit(measure, size).result())
        if not all(0 <= each["least"] <= each["most"] < size for each in rounds):
            raise SystemExit(f"a sample lies outside of the {size}")
        median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        medians[str(size)] = median
        cells = "".join(f"{1000 * median[key]:>11.1f} ms" for key in ("first", "random", "consecutive"))
        print(f"{size:>14,}{cells}{median['bytes'] / 2**20:>8,.0f} MiB", flush=True)
    write_record(args, medians=medians)


if __name__ == "__main__":
    main()
