"""Scores with confidence intervals by the bootstrap (Efron & Tibshirani 1993): percentiles over 1,000 resamples."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Interval = tuple[float, float]
"""Bounds of a 95 % confidence interval."""
Array = npt.NDArray[Any]

_RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
_CHUNK = 1 << 22


class Score(float):
    """Value of a metric with its 95 % confidence intervals.

    `intervals` are by the unit that is resampled: `sample` if other samples were drawn, `class` if other classes were.
    """

    intervals: Mapping[str, Interval]

    def __new__(cls, value: float, intervals: Mapping[str, Interval] | None = None) -> "Score":
        score = super().__new__(cls, value)
        score.intervals = intervals or {}
        return score


def mean_score(values: Tensor, classes: Tensor | None = None) -> Score:
    """Return the mean of one value per sample, such as 1 for a hit and 0 for a miss.

    Args:
        values: values of the samples [n], n >= 1.
        classes: class of each sample, int64 [n]; None, or -1 in it, if unknown: there is then no interval by class.
    """
    cells = _Cells(values, torch.zeros_like(values))
    intervals = {"sample": _percentiles(cells.resampled(lambda sums, counts: sums.sum(1) / counts.sum(1)))}
    if classes is not None and len(classes.unique()) > 1 and not bool((classes < 0).any()):
        by_class = _Cells(values, classes)
        drawn = _rng().integers(len(by_class.sums), size=(_RESAMPLES, len(by_class.sums)))
        intervals["class"] = _percentiles(by_class.sums[drawn].sum(1) / by_class.counts[drawn].sum(1))
    return Score(float(values.double().mean()), intervals)


def class_mean_score(values: Tensor, classes: Tensor) -> Score:
    """Return the mean over classes of the mean in each class. Classes without samples are left out.

    Args:
        values: values of the samples [n], n >= 1.
        classes: class of each sample, int64 [n], none of them -1.
    """
    cells = _Cells(values, classes)
    means = cells.sums / cells.counts
    intervals = {"sample": _percentiles(cells.resampled(_mean_of_drawn_classes))}
    if len(means) > 1:
        intervals["class"] = _percentiles(means[_rng().integers(len(means), size=(_RESAMPLES, len(means)))].mean(1))
    return Score(float(means.mean()), intervals)


def _mean_of_drawn_classes(sums: Array, counts: Array) -> Array:
    """Return the mean over the classes that were drawn, of sums and counts [resamples, classes]."""
    return np.asarray((sums / np.maximum(counts, 1)).sum(1) / (counts > 0).sum(1))


def statistic_score(statistic: Callable[[Tensor], float], count: int, resamples: int = 100) -> Score:
    """Return a statistic of a sample that is not a mean.

    Args:
        statistic: function from the indices of the drawn samples, int64 [count] with repetitions, to the value.
        count: number of samples.
        resamples: number of resamples.
    """
    rng = _rng()
    values = [statistic(torch.from_numpy(rng.integers(count, size=count))) for _ in range(resamples)]
    return Score(statistic(torch.arange(count)), {"sample": _percentiles(np.array(values))})


class _Cells:
    """Samples with the same class and value, counted: how often each cell is drawn is multinomial.

    `sums` and `counts` [classes] are those of the values of each class that occurs.
    """

    def __init__(self, values: Tensor, classes: Tensor) -> None:
        pairs = np.stack([classes.cpu().double().numpy(), values.cpu().double().numpy()])
        (of_class, self._values), self._counts = np.unique(pairs, axis=1, return_counts=True)
        self._starts = np.flatnonzero(np.diff(of_class, prepend=np.nan))
        self.sums, self.counts = self._by_class(self._counts[None])
        self.sums, self.counts = self.sums[0], self.counts[0]

    def _by_class(self, drawn: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the sums and counts [resamples, classes] of cells drawn int64 [resamples, cells] times."""
        return np.add.reduceat(drawn * self._values, self._starts, 1), np.add.reduceat(drawn, self._starts, 1)

    def resampled(self, statistic: Callable[[Array, Array], Array]) -> Array:
        """Return a statistic of the sums and counts [r, classes] of each of the resamples, [resamples]."""
        rng, rows, total = _rng(), max(1, _CHUNK // len(self._values)), self._counts.sum()
        parts = []
        for start in range(0, _RESAMPLES, rows):
            size = min(rows, _RESAMPLES - start)
            parts.append(statistic(*self._by_class(rng.multinomial(total, self._counts / total, size=size))))
        return np.concatenate(parts)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)  # the same intervals in every process, independent of the run's generators


def _percentiles(values: Array) -> Interval:
    low, high = np.percentile(values, _PERCENTILES)
    return float(low), float(high)
