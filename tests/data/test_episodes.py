"""Episodes: which classes and samples a batch holds."""

import numpy as np
import pytest

from mmpretrain.data.episodes import EpisodeOrder
from mmpretrain.data.stream import Shuffle
from tests.data.test_labels import CLASSES, label_of, read, shards, stream

__all__ = ["shards"]  # a fixture

OF_CLASS = [np.arange(0, 30), np.arange(30, 34), np.arange(34, 60), np.arange(60, 80)]


def test_each_episode_has_as_many_of_each_of_its_classes() -> None:
    order = EpisodeOrder(3, OF_CLASS, ways=2, per_class=5)
    assert order.num_samples == 76  # class 1 is too small
    owner = {int(sample): k for k, samples in enumerate(OF_CLASS) for sample in samples}
    seen = set()
    for episode in range(200):
        samples = order(np.arange(10 * episode, 10 * episode + 10)).tolist()
        assert len(set(samples)) == 10
        classes = [owner[sample] for sample in samples]
        assert sorted(map(classes.count, set(classes))) == [5, 5] and 1 not in classes
        seen |= set(samples)
    assert seen == {int(sample) for k in (0, 2, 3) for sample in OF_CLASS[k]}


def test_a_position_decides_and_nothing_else() -> None:
    order = EpisodeOrder(3, OF_CLASS, ways=2, per_class=5)
    positions = np.random.default_rng(0).permutation(500)
    whole = order(np.arange(500))
    assert np.array_equal(order(positions), whole[positions])
    assert not np.array_equal(EpisodeOrder(4, OF_CLASS, ways=2, per_class=5)(np.arange(500)), whole)


def test_too_few_classes_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"ways is 4, but 3 of 4 classes have per_class = 5 samples; expected at least"
    ):
        EpisodeOrder(0, OF_CLASS, ways=4, per_class=5)


def test_a_stream_reads_one_episode_a_batch(shards) -> None:  # type: ignore[no-untyped-def]
    samples = read(stream(shards, episodes=(2, 10)), num_steps=4)
    labels = [label_of(i) for i in samples.ids.tolist()]
    assert samples.labels is not None and samples.labels.tolist() == labels
    for step in range(4):
        own = labels[20 * step : 20 * step + 20]
        assert [own.count(k) for k in set(own)] == [10, 10]
    other = read(stream(shards, episodes=(2, 10)), num_steps=4, world_size=2, num_micro=5)
    assert other.ids.tolist() == samples.ids.tolist()


def test_what_is_no_episode_is_told(shards) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"episodes has 2 classes of 5 samples, but batches of 20; .*batch_size=10"):
        stream(shards, episodes=(2, 5))
    with pytest.raises(
        ValueError, match=r"data\.train\.pairs\.episodes needs labels; expected data\.train\.pairs\.label"
    ):
        stream(shards, label=None, episodes=(2, 10))
    with pytest.raises(ValueError, match=r"data\.train\.pairs\.shuffle is shards, but episodes draw .*shuffle=blocks"):
        stream(shards, episodes=(2, 10), shuffle=Shuffle.shards)
    with pytest.raises(ValueError, match=r"data\.train\.pairs\.episodes: ways is 4, but 3 of 3 classes"):
        stream(shards, classes=CLASSES, episodes=(4, 5))
