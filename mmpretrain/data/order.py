"""Which sample stands at global position s: a pure function of (seed, s, the shards' counts).

A source's epoch is a seeded permutation of its blocks of consecutive samples, and inside each window of
blocks a seeded permutation of the window's samples: reads stay local, and no shuffle buffer exists.
A stream of several weighted sources deals positions out in a fixed pattern that holds each source's share
exactly over a period, and to within one sample at every position where the period is kept as a table.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from mmpretrain.schedules import Clock, ScheduledValue
from mmpretrain.seeds import hash64, permutation

BLOCK_SIZE = 256
WINDOW_BLOCKS = 64
MAX_TABLE = 10_000
"""The longest period of several sources that is kept as a table."""


class SourceOrder:
    """The order of one source's samples, epoch after epoch.

    Args:
        seed: names the order.
        num_samples: how many samples the source has.
        block_sizes: int64 [num_blocks], consecutive samples that are read together; None cuts the source into
            blocks of `BLOCK_SIZE`.
        window_blocks: how many blocks are shuffled into each other.
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
        # An epoch's block order is kept for the epoch before and the one after a boundary; windows are few.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in their order, int64 [num_blocks]; where each window of them starts, int64 [num_windows + 1])."""
        blocks = permutation(hash64(self._seed, epoch), len(self._sizes))
        ends = np.cumsum(self._sizes[blocks])
        last_blocks = np.arange(self._window_blocks, len(blocks), self._window_blocks) - 1
        return blocks, np.concatenate([[0], ends[last_blocks], [self.num_samples]])

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window in their order, int64."""
        blocks = self._epoch(epoch)[0][window * self._window_blocks : (window + 1) * self._window_blocks]
        samples = np.concatenate([np.arange(self._starts[b], self._starts[b] + self._sizes[b]) for b in blocks])
        return samples[permutation(hash64(self._seed, epoch, window), len(samples))]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Positions int64 [n] of this source -> sample ids int64 [n] in [0, num_samples)."""
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

    Of the sources that have not yet had their share, the next position goes to the one whose next sample is due
    first: earliest deadline first, which meets every deadline and so stays within one sample of every share.
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
    """Deal positions out to sources by arithmetic, for periods that are too long for a table.

    Of every W positions that the sources k, k + 1, ... share (W: the sum of their shares w), source k takes the positions i
    where floor((i + 1) w_k / W) exceeds floor(i w_k / W); the rest is numbered anew and dealt out to k + 1, ... alike. Each
    source has exactly its share of a period; in between it is less than one sample from its part of what the sources
    before it leave.

    Args:
        positions: int64 [n].
        shares: positive integers of any size.

    Returns: (source int64 [n], index within the source's own sequence int64 [n]).
    """
    sources, indices = np.full(len(positions), len(shares) - 1, dtype=np.int64), positions.copy()
    rows, rest = np.arange(len(positions)), sum(shares)
    # Products of remainders and shares have to fit; Python's integers are exact at any size.
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
    """The order of one stream: its sources' orders, dealt out by their weights.

    Args:
        sources: their orders.
        weights: their shares.
        period: after so many positions the order starts again, with the same seeds; None: never.
    """

    def __init__(self, sources: Sequence[SourceOrder], weights: Sequence[float], period: int | None = None) -> None:
        self.sources = sources
        self._period = period
        self._shares = integer_shares(weights)
        self._pattern = quota_pattern(self._shares) if sum(self._shares) <= MAX_TABLE else None
        if self._pattern is not None:
            self._counts = np.cumsum(self._pattern[:, None] == np.arange(len(sources)), axis=0)

    @property
    def num_samples(self) -> int:
        """How many samples an epoch of the stream has: those of all its sources."""
        return sum(source.num_samples for source in self.sources)

    def wrapped(self, positions: np.ndarray) -> np.ndarray:
        """Positions int64 [n], those of a repetition as they were the first time."""
        return positions if self._period is None else positions % self._period

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream positions int64 [n] -> (source int64 [n], sample id within the source int64 [n])."""
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


def step_range(batch_size: ScheduledValue, step: int, clock: Clock) -> range:
    """The positions of a stream that a step takes: they follow those of the steps before it, whatever its stages' sizes.

    Args:
        batch_size: samples of a step, which changes in stages.
        step: its number, from 0.
        clock: what the stages are measured against.
    """
    # A stage begins with the first step that starts at its breakpoint or behind it; the first one with the run.
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
    """One rank's micro-batches of the step that takes positions `taken`.

    The batch is sorted by where its samples lie, cut into ranks, then into micro-batches.

    Returns: for each micro-batch (positions, sources, sample ids), int64 [b] each.
    """
    positions = order.wrapped(np.arange(taken.start, taken.stop))
    sources, samples = order(positions)
    by_place = np.lexsort((positions, samples, sources))
    mine = np.split(by_place, world_size)[rank]
    return [(positions[rows], sources[rows], samples[rows]) for rows in np.split(mine, num_micro_batches)]
