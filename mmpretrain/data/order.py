"""Sample order: a pure function of the seed, the stream position and the shards' sample counts.

Each epoch of a source permutes its blocks of consecutive samples, then the samples within each window of blocks; both
permutations are seeded. Reads stay local, and no shuffle buffer is needed. Blocks are of `BLOCK_SIZE` samples, and windows of
`WINDOW_BLOCKS` blocks. For shards that are fetched whole, blocks are the shards, and windows hold as many samples on average.
A stream of several weighted sources assigns positions to sources by a fixed pattern. Shares are exact over a period. Periods
of up to `MAX_TABLE` positions are tabulated, and within one sample of the share at every position.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Protocol

import numpy as np

from mmpretrain.schedules import Clock, ScheduledValue
from mmpretrain.seeds import hash64, permutation

BLOCK_SIZE = 256
WINDOW_BLOCKS = 64
MAX_TABLE = 10_000
"""The longest period of several sources that is kept as a table."""


class SourceOrder:
    """Sample order of one source, over all epochs.

    Args:
        seed: seed of the order.
        num_samples: number of samples in the source.
        shard_sizes: numbers of samples of the source's shards, int64 [n], to read one shard after the other; None: blocks
            of 256 samples.
    """

    def __init__(self, seed: int, num_samples: int, shard_sizes: np.ndarray | None = None) -> None:
        self.num_samples = num_samples
        self._seed = seed
        # Blocks of 256 samples are described by arithmetic, not by tables: there may be millions.
        self._sizes = None if shard_sizes is None else shard_sizes[shard_sizes > 0]
        self._num_blocks = -(-num_samples // BLOCK_SIZE) if self._sizes is None else len(self._sizes)
        self._window_blocks = WINDOW_BLOCKS
        if self._sizes is not None:
            self._window_blocks = max(2, -(-WINDOW_BLOCKS * BLOCK_SIZE * self._num_blocks // num_samples))
        # Positions around an epoch boundary need the block order of two epochs, and few windows.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    @property
    def window_samples(self) -> int:
        """Number of samples in a window, rounded up for windows that differ."""
        return min(self.num_samples, -(-self._window_blocks * self.num_samples // self._num_blocks))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (block order, [num_blocks], of the narrowest integers; end of each window, int64 [num_windows])."""
        blocks = permutation(hash64(self._seed, epoch), self._num_blocks)
        firsts = np.arange(0, self._num_blocks, self._window_blocks)
        if self._sizes is None:
            ends = np.minimum(firsts + self._window_blocks, self._num_blocks) * BLOCK_SIZE
            last = int(np.flatnonzero(blocks == self._num_blocks - 1)[0])  # the one block that is not full
            ends[last // self._window_blocks :] -= self._num_blocks * BLOCK_SIZE - self.num_samples
        else:
            ends = np.cumsum(np.add.reduceat(self._sizes[blocks], firsts))
        return blocks.astype(np.min_scalar_type(self._num_blocks)), ends

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample ids of one window in shuffled order, int64."""
        first = window * self._window_blocks
        blocks = self._epoch(epoch)[0][first : first + self._window_blocks].astype(np.int64)
        if self._sizes is None:
            samples = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).flatten()
            samples = samples[samples < self.num_samples]
        else:
            sizes = self._sizes
            starts = np.cumsum(sizes) - sizes
            samples = np.concatenate([starts[block] + np.arange(sizes[block]) for block in blocks])
        return samples[permutation(hash64(self._seed, epoch, window), len(samples))]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions of this source, int64 [n], to sample ids in [0, num_samples), int64 [n]."""
        samples = np.empty(len(positions), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            ends = self._epoch(epoch)[1]
            windows = np.searchsorted(ends, offsets, side="right")
            for window in np.unique(windows[of_epoch]).tolist():
                rows = np.flatnonzero(of_epoch & (windows == window))
                start = ends[window - 1] if window else 0
                samples[rows] = self._window(epoch, window)[offsets[rows] - start]
        return samples

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)


class PositionOrder(Protocol):
    """Interface of the order of one source."""

    num_samples: int

    @property
    def window_samples(self) -> int: ...
    def __call__(self, positions: np.ndarray) -> np.ndarray: ...


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the ratio of the weights, as they are written: their sum is the period of the order.

    Raises: ValueError if a weight is not positive.
    """
    if min(weights) <= 0:
        raise ValueError(f"source weights are {list(weights)}; each must be positive: leave out a source instead")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [each // gcd(*whole) for each in whole]


def quota_pattern(shares: Sequence[int]) -> np.ndarray:
    """Return the source of each position of a period: int64 [sum(shares)], source k in `shares[k]` of them.

    The pattern is earliest deadline first: among the sources below their share, the next position goes to the one
    whose next sample is due first. This meets every deadline, so each source stays within one sample of its share.
    (Taking the source that is furthest behind does not: with seven sources it can be off by more than one.)
    """
    period = sum(shares)
    taken = [0] * len(shares)
    pattern = np.empty(period, dtype=np.int64)
    for i in range(period):
        may_take = [k for k, share in enumerate(shares) if taken[k] * period < share * (i + 1)]
        source = min(may_take, key=lambda k: Fraction(taken[k] + 1, shares[k]))
        taken[source] += 1
        pattern[i] = source
    return pattern


def split_by_shares(positions: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Assign positions to sources by arithmetic, for periods that are too long for a table.

    Let W be the sum of the shares w of sources k, k + 1, .... Of the positions left for them, source k takes those numbers i
    where floor((i + 1) w_k / W) > floor(i w_k / W); the others are renumbered and assigned to k + 1, ... the same way. Each
    source has exactly its share of a period. Within a period, source k is within one sample of its share of the positions
    that the sources before it leave.

    Args:
        positions: int64 [n].
        shares: positive integers of any size.

    Returns: (source int64 [n], index within the source's own sequence int64 [n]).
    """
    sources, indices = np.full(len(positions), len(shares) - 1, dtype=np.int64), positions.copy()
    rows, rest = np.arange(len(positions)), sum(shares)
    # Products of offsets and shares must fit int64; Python's integers are exact at any size.
    left = positions if rest < 1 << 31 else positions.astype(object)
    for k, share in enumerate(shares[:-1]):
        periods, offsets = left // rest, left % rest
        before, after = (periods * share + offset * share // rest for offset in (offsets, offsets + 1))
        is_taken = (after > before).astype(bool)
        sources[rows[is_taken]], indices[rows[is_taken]] = k, before[is_taken]
        rows, left, rest = rows[~is_taken], (left - before)[~is_taken], rest - share
    indices[rows] = left
    return sources, indices


class Order:
    """Sample order of one stream, which interleaves the orders of its sources by weight.

    Args:
        sources: order of each source.
        weights: sampling weight of each source.
        period: number of positions after which the order repeats, with the same seeds; None never repeats.
    """

    def __init__(self, sources: Sequence[PositionOrder], weights: Sequence[float], period: int | None = None) -> None:
        self.sources = sources
        self._period = period
        self._shares = integer_shares(weights)
        self._pattern = quota_pattern(self._shares) if sum(self._shares) <= MAX_TABLE else None
        if self._pattern is not None:
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
        if self._pattern is None:
            sources, indices = split_by_shares(positions, self._shares)
        else:
            periods, offsets = np.divmod(positions, len(self._pattern))
            sources = self._pattern[offsets]
            indices = periods * self._counts[-1, sources] + self._counts[offsets, sources] - 1
        samples = np.empty(len(positions), dtype=np.int64)
        for i, order in enumerate(self.sources):
            rows = np.flatnonzero(sources == i)
            samples[rows] = order(indices[rows])
        return sources, samples


def step_range(batch_size: ScheduledValue, step: int, clock: Clock, passed_over: int = 0) -> range:
    """Return the stream positions of a step. Steps are contiguous, even where the batch size changes.

    Args:
        batch_size: samples per step; may change in stages.
        step: step number, from 0.
        clock: clock that defines the breakpoints of the stages.
        passed_over: number of positions before the step that no step takes.
    """
    # A stage begins with the first step that starts at or after its breakpoint; the first stage begins at step 0.
    first_steps = [0, *(-(-place // clock.batch_size) for place in batch_size.breakpoint_samples(clock)[1:])]
    sizes = [int(size) for size in batch_size.values]
    start = passed_over
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
