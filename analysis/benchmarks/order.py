r"""Measure time and memory of the sample order for data sets of 10^6 to 10^9 samples.

    python -m analysis.benchmarks.order [--samples 1e6,1e7,1e8,1e9] [--output order.json]

The order is computed (`mmpretrain.data.order`): nothing is shuffled in memory, and there is no list of samples. For each
size a new process builds the order of one source in blocks of 256 and computes the first batch, batches at random positions
of the first 100 epochs (as a resumed run does), and consecutive batches (as training does). The table has medians over
`--rounds` processes, and the peak memory beyond the memory that the process held before. Two epochs of 10^6 samples must
contain each sample once, in different orders; in larger sizes the samples must be in range.
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
    """Return the batch that begins at a position: positions and samples, int64 [BATCH_SIZE] each, in the order of reading."""
    ((positions, _, samples),) = step_positions(order, range(start, start + BATCH_SIZE), 0, 1, 1)
    return positions, samples


def check(num_samples: int) -> None:
    """Check two epochs. Raises: SystemExit if one does not contain each sample once, or both have the same order."""
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
    """Return seconds, peak memory in bytes, and the smallest and largest sample drawn. Runs in a new process."""
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
    """Run the command."""
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
        # Fork, since no thread has been started, and importing would take longer than measuring.
        context = multiprocessing.get_context("fork")
        rounds = []
        for _ in range(args.rounds):
            with ProcessPoolExecutor(1, mp_context=context) as pool:  # raises if its process is killed
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
