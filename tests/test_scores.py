"""Confidence intervals, against resampling by hand and against the distribution that is known."""

import json

import numpy as np
import pytest
import torch

from mmpretrain.scores import Score, class_mean_score, mean_score, statistic_score

HITS = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
CLASSES = torch.tensor([0] * 3 + [1] * 7 + [4] * 10)


def by_hand(unit: str, mean_of_classes: bool) -> tuple[float, float]:
    """Percentiles over resamples that are drawn one by one."""
    rng = np.random.default_rng(7)
    values, classes = HITS.double().numpy(), CLASSES.numpy()
    names, results = np.unique(classes), []
    for _ in range(20_000):
        if unit == "sample":
            drawn = rng.integers(len(values), size=len(values))
            groups = [values[drawn][classes[drawn] == name] for name in names]
        else:
            groups = [values[classes == names[i]] for i in rng.integers(len(names), size=len(names))]
        groups = [group for group in groups if len(group)]
        flat = np.concatenate(groups)
        results.append(np.mean([group.mean() for group in groups]) if mean_of_classes else flat.mean())
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("unit", ["sample", "class"])
@pytest.mark.parametrize("mean_of_classes", [False, True])
def test_intervals_are_those_of_resampling_by_hand(unit: str, mean_of_classes: bool) -> None:
    score = (class_mean_score if mean_of_classes else mean_score)(HITS, CLASSES)
    assert score.intervals[unit] == pytest.approx(by_hand(unit, mean_of_classes), abs=0.03)


def test_values_are_means_over_samples_and_over_classes() -> None:
    assert mean_score(HITS, CLASSES) == 14 / 20
    assert class_mean_score(HITS, CLASSES) == pytest.approx((2 / 3 + 4 / 7 + 8 / 10) / 3)


def test_intervals_of_continuous_values_have_the_width_of_the_central_limit() -> None:
    values = torch.randn(5000, dtype=torch.float64) * 3 + 10
    low, high = mean_score(values).intervals["sample"]
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 5000**0.5, rel=0.1)
    assert (high + low) / 2 == pytest.approx(float(values.mean()), abs=0.01)


def test_no_interval_by_class_where_classes_are_unknown_or_one() -> None:
    assert set(mean_score(HITS).intervals) == {"sample"}
    assert set(mean_score(HITS, torch.full((20,), -1)).intervals) == {"sample"}
    assert set(mean_score(HITS, torch.zeros(20, dtype=torch.int64)).intervals) == {"sample"}
    assert set(class_mean_score(HITS, torch.zeros(20, dtype=torch.int64)).intervals) == {"sample"}


def test_the_same_intervals_whatever_the_generators_have_drawn() -> None:
    first = mean_score(HITS, CLASSES)
    np.random.default_rng().random(5)
    torch.rand(5)
    assert mean_score(HITS, CLASSES).intervals == first.intervals


def test_a_statistic_is_computed_on_resamples() -> None:
    values = torch.arange(101.0)
    score = statistic_score(lambda drawn: float(values[drawn].median()), 101)
    low, high = score.intervals["sample"]
    assert score == 50 and 25 < low < 50 < high < 75


def test_a_score_is_a_number() -> None:
    score = Score(0.25, {"sample": (0.2, 0.3)})
    assert json.dumps({"x": score}) == '{"x": 0.25}' and f"{score:.2f}" == "0.25" and score + 1 == 1.25
    assert Score(0.25).intervals == {}
