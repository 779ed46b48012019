"""Sample order: a pure function of the seed, the stream position and the shards' sample counts.

Each epoch of a source permutes its blocks of consecutive samples, then the samples within each window of
blocks; both permutations are seeded. Reads stay local, and no shuffle buffer is needed.
A stream of several weighted sources assigns positions to sources by a fixed pattern, which keeps each source
within one sample of its share at every position.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from mmpretrain.schedules import Clock, ScheduledValue
from mmpretrain.seeds import hash64, permutation

BLOCK_SIZE = 256
WINDOW_BLOCKS = 64
MAX_PERIOD = 10_000


class SourceOrder:
    """Sample order of one source, over all epochs.

    Args:
        seed: seed of the order.
        num_samples: number of samples in the source.
        block_sizes: number of consecutive samples in each block, int64 [num_blocks]; None uses blocks of
            `BLOCK_SIZE` samples.
        window_blocks: number of blocks whose samples are shuffled together.
    """

    def __init__(
        self,
        seed: int,
        num_samples: int,
        block_sizes: np.ndarray | None = None,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        if block_sizes is None:
            num_blocks = -(-num_samples // BLOCK_SIZE)
            block_sizes = np.full(num_blocks, BLOCK_SIZE, dtype=np.int64)
            block_sizes[-1] = num_samples - BLOCK_SIZE * (num_blocks - 1)
        self.num_samples = num_samples
        self._seed = seed
        self._sizes = block_sizes
        self._starts = np.cumsum(block_sizes) - block_sizes
        self._window_blocks = window_blocks
        # Positions around an epoch boundary need the block order of two epochs, and few windows.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (block order, int64 [num_blocks]; window offsets from 0 to num_samples, int64 [num_windows + 1])."""
        blocks = permutation(hash64(self._seed, epoch), len(self._sizes))
        ends = np.cumsum(self._sizes[blocks])
        last_blocks = np.arange(self._window_blocks, len(blocks), self._window_blocks) - 1
        return blocks, np.concatenate([[0], ends[last_blocks], [self.num_samples]])

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample ids of one window in shuffled order, int64."""
        blocks = self._epoch(epoch)[0][window * self._window_blocks : (window + 1) * self._window_blocks]
        samples = np.concatenate([np.arange(self._starts[b], self._starts[b] + self._sizes[b]) for b in blocks])
        return samples[permutation(hash64(self._seed, epoch, window), len(samples))]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions of this source, int64 [n], to sample ids in [0, num_samples), int64 [n]."""
        samples = np.empty(len(positions), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        for epoch in np.unique(epochs).tolist():
            window_starts = self._epoch(epoch)[1]
            of_epoch = epochs == epoch
            windows = np.searchsorted(window_starts, offsets, side="right") - 1
            for window in np.unique(windows[of_epoch]).tolist():
                rows = np.flatnonzero(of_epoch & (windows == window))
                samples[rows] = self._window(epoch, window)[offsets[rows] - window_starts[window]]
        return samples

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)


def quota_pattern(weights: Sequence[float]) -> np.ndarray:
    """Return the source of each position in one period, int64 [period]. Shares are exact over the period.

    The pattern is earliest deadline first: among the sources below their share, the next position goes to the one
    whose next sample is due first. This meets every deadline, so each source stays within one sample of its share.
    (Taking the source that is furthest behind does not: with seven sources it can be off by more than one.)
    Raises: ValueError if a weight is not positive, or if the period exceeds `MAX_PERIOD`.
    """
    if min(weights) <= 0:
        raise ValueError(f"source weights are {list(weights)}; each must be positive: leave out a source instead")
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        raise ValueError(
            f"source weights {list(weights)} repeat only after {period} samples, more than {MAX_PERIOD}; round them"
        )
    taken = [0] * len(weights)
    pattern = np.empty(period, dtype=np.int64)
    for i in range(period):
        may_take = [k for k, share in enumerate(shares) if taken[k] < share * (i + 1)]
        source = min(may_take, key=lambda k: (taken[k] + 1) / shares[k])
        taken[source] += 1
        pattern[i] = source
    return pattern


class Order:
    """Sample order of one stream, which interleaves the orders of its sources by weight.

    Args:
        sources: order of each source.
        weights: sampling weight of each source.
        period: number of positions after which the order repeats, with the same seeds; None never repeats.
    """

    def __init__(self, sources: Sequence[SourceOrder], weights: Sequence[float], period: int | None = None) -> None:
        self.sources = sources
        self._period = period
        self._pattern = quota_pattern(weights)
        self._counts = np.cumsum(self._pattern[:, None] == np.arange(len(sources)), axis=0)

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch of the stream: the sum over its sources."""
        return sum(source.num_samples for source in self.sources)

    def wrapped(self, positions: np.ndarray) -> np.ndarray:
        """Return positions, int64 [n], modulo the period; a repetition gets its original positions."""
        return positions if self._period is None else positions % self._period

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map stream positions, int64 [n], to (sources, sample ids within the source), int64 [n] each."""
        positions = self.wrapped(positions)
        periods, places = np.divmod(positions, len(self._pattern))
        sources = self._pattern[places]
        samples = np.empty(len(positions), dtype=np.int64)
        for i, order in enumerate(self.sources):
            rows = np.flatnonzero(sources == i)
            samples[rows] = order(periods[rows] * self._counts[-1, i] + self._counts[places[rows], i] - 1)
        return sources, samples


def step_range(batch_size: ScheduledValue, step: int, clock: Clock) -> range:
    """Return the stream positions of a step. Steps are contiguous, even where the batch size changes.

    Args:
        batch_size: samples per step; may change in stages.
        step: step number, from 0.
        clock: clock that defines the breakpoints of the stages.
    """
    # A stage begins with the first step that starts at or after its breakpoint; the first stage begins at step 0.
    first_steps = [0, *(-(-place // clock.batch_size) for place in batch_size.breakpoint_samples(clock)[1:])]
    sizes = [int(size) for size in batch_size.values]
    start = 0
    for first, end, size in zip(first_steps, [*first_steps[1:], step + 1], sizes, strict=True):
        if step < end:
            return range(start + (step - first) * size, start + (step - first + 1) * size)
        start += (end - first) * size
    raise AssertionError(f"step {step}")


def step_positions(
    order: Order, taken: range, rank: int, world_size: int, num_micro_batches: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the micro-batches of one rank, for the step at positions `taken`.

    The batch is sorted by storage order (source, then sample id), then split over the ranks, then into micro-batches.

    Returns: (positions, sources, sample ids) of each micro-batch, int64 [b] each.
    """
    positions = order.wrapped(np.arange(taken.start, taken.stop))
    sources, samples = order(positions)
    by_place = np.lexsort((positions, samples, sources))
    mine = np.split(by_place, world_size)[rank]
    return [(positions[rows], sources[rows], samples[rows]) for rows in np.split(mine, num_micro_batches)]
