"""The order of samples: a permutation every epoch, local, exact in its quotas, and the same however it is cut."""

import pickle
import time
from collections import Counter

import numpy as np
import pytest

from mmpretrain.data.order import (
    BLOCK_SIZE,
    WINDOW_BLOCKS,
    Order,
    SourceOrder,
    integer_shares,
    quota_pattern,
    split_by_shares,
    step_positions,
    step_range,
)
from mmpretrain.schedules import Clock, Scheduled, ScheduledValue, TrainingProgress
from mmpretrain.seeds import draw, hash64


def reference_epoch(seed: int, epoch: int, num_samples: int) -> list[int]:
    """One epoch's samples as the module's docstring describes them, in plain Python."""
    blocks = [range(start, min(start + BLOCK_SIZE, num_samples)) for start in range(0, num_samples, BLOCK_SIZE)]
    key = hash64(seed, epoch)
    order = sorted(range(len(blocks)), key=lambda block: draw(key, block))
    samples = []
    for window, first in enumerate(range(0, len(order), WINDOW_BLOCKS)):
        content = [sample for block in order[first : first + WINDOW_BLOCKS] for sample in blocks[block]]
        key = hash64(seed, epoch, window)
        samples += [content[i] for i in sorted(range(len(content)), key=lambda i: draw(key, i))]
    return samples


WINDOW = WINDOW_BLOCKS * BLOCK_SIZE
SIZES = [1, 2, 255, 256, 257, 511, 1500, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 257, 2 * WINDOW + 77]


def reference_epoch_of_shards(seed: int, epoch: int, sizes: list[int], window_shards: int) -> list[int]:
    """One epoch of an order by shards, in plain Python."""
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    key = hash64(seed, epoch)
    order = sorted(range(len(sizes)), key=lambda shard: draw(key, shard))
    samples = []
    for window, first in enumerate(range(0, len(order), window_shards)):
        content = [starts[shard] + i for shard in order[first : first + window_shards] for i in range(sizes[shard])]
        key = hash64(seed, epoch, window)
        samples += [content[i] for i in sorted(range(len(content)), key=lambda i: draw(key, i))]
    return samples


@pytest.mark.parametrize(
    ("sizes", "window_shards"),
    [([7], 2347), ([3, 1, 5], 5462), ([9000, 8000, 10_000, 20_000, 3, 9000], 2), ([40_000, 1, 30_000], 2)],
)
def test_an_order_by_shards_mixes_a_few_of_them_at_a_time(sizes: list[int], window_shards: int) -> None:
    order = SourceOrder(5, sum(sizes), np.array(sizes))
    if window_shards > len(sizes):
        window_shards = len(sizes)
    expected = [reference_epoch_of_shards(5, epoch, sizes, window_shards) for epoch in range(2)]
    assert order(np.arange(2 * sum(sizes))).tolist() == expected[0] + expected[1]
    assert order.window_samples <= sum(sizes)
    assert pickle.loads(pickle.dumps(order))(np.array([3])).tolist() == [expected[0][3]]


def test_shards_of_which_nothing_is_kept_are_passed_over() -> None:
    order = SourceOrder(5, 30, np.array([10, 0, 20]))
    assert sorted(order(np.arange(30)).tolist()) == list(range(30))


@pytest.mark.parametrize("num_samples", SIZES)
def test_every_epoch_holds_every_sample_once(num_samples: int) -> None:
    order = SourceOrder(3, num_samples)
    epochs = order(np.arange(4 * num_samples)).reshape(4, num_samples)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_samples), (4, 1)))
    if num_samples > 2:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


@pytest.mark.parametrize("num_samples", [4 * BLOCK_SIZE + 77, 2 * WINDOW + 3 * BLOCK_SIZE + 77])
def test_order_is_what_its_docstring_says(num_samples: int) -> None:
    order = SourceOrder(2**64 - 1, num_samples)
    expected = [sample for epoch in range(2) for sample in reference_epoch(2**64 - 1, epoch, num_samples)]
    assert order(np.arange(2 * num_samples)).tolist() == expected


def test_a_position_has_one_sample_whoever_asks_and_when() -> None:
    num = 2 * WINDOW + 1000
    whole = SourceOrder(0, num)(np.arange(3 * num))
    order = SourceOrder(0, num)
    positions = np.random.default_rng(0).permutation(3 * num)  # epochs and windows in no order
    for part in np.array_split(positions, 8):
        assert np.array_equal(order(part), whole[part])


def test_the_order_is_shuffled() -> None:
    """Positions and samples are uncorrelated, and neighbours are hardly ever neighbours on disk."""
    num = 40_000
    epochs = SourceOrder(1, num)(np.arange(2 * num)).reshape(2, num)
    assert abs(np.corrcoef(np.arange(num), epochs[0])[0, 1]) < 0.2  # 157 blocks are what is shuffled over all the data
    assert np.mean(np.abs(np.diff(epochs[0])) == 1) < 0.001
    assert np.mean(epochs[0] == epochs[1]) < 0.001
    assert np.mean(epochs[0] == SourceOrder(2, num)(np.arange(num))) < 0.001


def test_a_window_touches_few_blocks() -> None:
    num = 3 * WINDOW_BLOCKS * BLOCK_SIZE
    blocks = SourceOrder(1, num)(np.arange(num)) // BLOCK_SIZE
    for window in blocks.reshape(3, -1):
        assert len(np.unique(window)) == WINDOW_BLOCKS
        assert np.ptp(np.unique(window)) > 2 * WINDOW_BLOCKS  # they lie all over the data
        assert len(np.unique(window[:BLOCK_SIZE])) > 0.9 * WINDOW_BLOCKS  # and are mixed at once


def test_a_place_among_a_billion_samples_is_found_in_two_seconds() -> None:
    start = time.process_time()
    order = SourceOrder(0, 10**9)
    samples = order(np.arange(5 * 10**9 + 123_456_789, 5 * 10**9 + 123_456_789 + 1024))
    assert time.process_time() - start < 2
    assert len(np.unique(samples)) == 1024 and samples.min() >= 0 and samples.max() < 10**9


def test_an_order_of_a_billion_samples_holds_no_table() -> None:
    assert len(pickle.dumps(SourceOrder(0, 10**9))) < 1000


def test_order_survives_pickling() -> None:
    order = Order([SourceOrder(0, 300), SourceOrder(1, 200)], [3, 1])
    positions = np.arange(900)
    before = order(positions)  # fills its caches
    after = pickle.loads(pickle.dumps(order))(positions)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


WEIGHTS = [
    [1.0],
    [1, 1],
    [3, 1],
    [0.7, 0.2, 0.1],
    [0.1] * 10,
    [1, 2, 3, 5, 7],
    [100, 1],
    [1, 6, 4, 3, 6, 2],  # a source that is even with its share may not take: it would be one ahead
    [3, 3, 2, 100, 50, 1, 1, 10, 100, 50, 1],  # taking the source furthest behind is off by 1.26 here
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_quotas_are_exact_over_a_period_and_within_one_sample_at_every_prefix(weights: list[float]) -> None:
    pattern = quota_pattern(integer_shares(weights))
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    assert counts[-1] == pytest.approx(shares * len(pattern), abs=1e-9)
    assert np.abs(counts - shares * np.arange(1, len(pattern) + 1)[:, None]).max() < 1


@pytest.mark.parametrize(("weights", "period"), [([0.7, 0.2, 0.1], 10), ([0.1, 0.3], 4), ([2, 4], 3), ([5.0], 1)])
def test_the_period_is_the_shortest_whatever_floats_hold(weights: list[float], period: int) -> None:
    assert sum(integer_shares(weights)) == period


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], r"\[1\.0, 0\.0\]; each must be positive"),
        ([1.0, -2.0], "each must be positive"),
    ],
)
def test_weights_without_a_quota_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integer_shares(weights)


@pytest.mark.parametrize("shares", [[1, 1], [3, 1], [7, 2, 1], [1, 2, 3, 5, 7], [40, 1, 1, 3]])
def test_positions_dealt_out_by_arithmetic_are_each_sources_next(shares: list[int]) -> None:
    positions = np.arange(3 * sum(shares))
    sources, indices = split_by_shares(positions, shares)
    assert np.bincount(sources).tolist() == [3 * share for share in shares]
    for source in range(len(shares)):
        assert indices[sources == source].tolist() == list(range(3 * shares[source]))
    counts = np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)
    exact = np.array(shares) / sum(shares) * np.arange(1, len(positions) + 1)[:, None]
    assert np.abs(counts - exact)[:, 0].max() < 1 and np.abs(counts - exact).max() < len(shares)
    some = np.random.default_rng(0).permutation(len(positions))[:20]
    assert [part.tolist() for part in split_by_shares(some, shares)] == [sources[some].tolist(), indices[some].tolist()]


@pytest.mark.slow
def test_shares_of_any_number_of_digits_are_exact() -> None:
    order = Order([SourceOrder(0, 30), SourceOrder(1, 50), SourceOrder(2, 20)], [0.1234567891, 1.0, 1e-7])
    shares = integer_shares([0.1234567891, 1.0, 1e-7])
    assert sum(shares) == 11_234_568_891 > 1 << 31
    sources, samples = order(np.arange(200_000))
    expected = [200_000 * share / sum(shares) for share in shares]
    assert np.abs(np.bincount(sources, minlength=3) - expected).max() < 2
    for source, num in enumerate((30, 50, 20)):
        drawn = samples[sources == source]
        assert np.array_equal(drawn, SourceOrder(source, num)(np.arange(len(drawn))))
    # Positions whose products with the shares a float would round.
    far = range(4 * 10**15 + 1, 4 * 10**15 + 13)
    _, indices = split_by_shares(np.array(far), [3, 1])
    assert indices.tolist() == [i * 3 // 4 if (i + 1) * 3 // 4 > i * 3 // 4 else i - i * 3 // 4 for i in far]


def test_each_weighted_source_goes_through_its_own_epochs() -> None:
    """A source of weight 3 in 4 is drawn three times as often, and none of its samples before all others were."""
    order = Order([SourceOrder(0, 30), SourceOrder(1, 50)], [3, 1])
    assert order.num_samples == 80
    sources, samples = order(np.arange(800))
    assert np.bincount(sources).tolist() == [600, 200]
    for source, (num, epochs) in enumerate([(30, 20), (50, 4)]):
        drawn = samples[sources == source].reshape(epochs, num)
        assert np.array_equal(np.sort(drawn, axis=1), np.tile(np.arange(num), (epochs, 1)))
        assert np.array_equal(drawn.ravel(), SourceOrder(source, num)(np.arange(epochs * num)))
    some = np.random.default_rng(0).permutation(800)[:100]
    assert np.array_equal(order(some)[0], sources[some]) and np.array_equal(order(some)[1], samples[some])


@pytest.mark.parametrize("start", [0, 48, 96, 1200])
def test_a_step_is_the_same_set_however_it_is_cut(start: int) -> None:
    """100 samples and batches of 48: some of these cross an epoch's end."""
    order = Order([SourceOrder(0, 60), SourceOrder(1, 40)], [3, 2])
    sources, samples = order(np.arange(start, start + 48))
    for world, micro in [(1, 1), (2, 3), (4, 2), (1, 48), (48, 1)]:
        parts = [step_positions(order, range(start, start + 48), rank, world, micro) for rank in range(world)]
        assert [[len(part[0]) for part in rank] for rank in parts] == [[48 // world // micro] * micro] * world
        rows = [tuple(row) for rank in parts for part in rank for row in np.stack(part, axis=1).tolist()]
        assert sorted(rows) == list(zip(range(start, start + 48), sources.tolist(), samples.tolist(), strict=True))
        places = [(source, sample) for _, source, sample in rows]
        assert places == sorted(places)  # read in the order in which they lie on disk


def test_batches_cross_an_epochs_end_without_padding_or_dropping() -> None:
    order = Order([SourceOrder(0, 10)], [1])
    batches = [step_positions(order, range(step * 4, step * 4 + 4), 0, 1, 1)[0][2] for step in range(5)]
    assert [len(batch) for batch in batches] == [4] * 5
    assert Counter(np.concatenate(batches).tolist()) == Counter(list(range(10)) * 2)


@pytest.mark.parametrize(
    "sizes", [4, {"piecewise": {"0%": 4, "30samples": 8, "50%": 2}}, {"piecewise": {"2steps": 6, "3steps": 4}}]
)
def test_steps_take_positions_one_after_the_other_whatever_the_stages_sizes(sizes: Scheduled) -> None:
    batch_size, clock = ScheduledValue(sizes, "x", in_stages=True), Clock(10, 100, 200)
    taken, seen = [], []
    for step in range(20):
        positions = step_range(batch_size, step, clock)
        taken += list(positions)
        seen.append(len(positions))
    assert taken == list(range(len(taken)))
    assert seen == [batch_size(TrainingProgress(10 * step, clock)) for step in range(20)]
