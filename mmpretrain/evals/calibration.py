"""Calibration of zero-shot probabilities: expected calibration error, and what one temperature mends (Guo et al. 2017)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmpretrain import seeds
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.embeddings import check_several
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score, mean_score, statistic_score

_MAX_ITERATIONS = 100


def calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int) -> float:
    """Return the expected calibration error: sum_b |B_b| / n * |acc(B_b) - conf(B_b)| (Guo et al. 2017, equation 3).

    Args:
        probabilities: probabilities of the classes [n, C].
        labels: true classes, int64 [n].
        num_bins: number of bins of equal width, by the probability of the predicted class. A tie for it is no hit.
    """
    hits = (right_class_ranks(probabilities, labels) < 1).double()
    return _error_of_bins(probabilities.double().amax(1), hits, num_bins)


def _error_of_bins(confidence: Tensor, hits: Tensor, num_bins: int) -> float:
    bins = (
        (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    )  # bin b is (b / num_bins, (b + 1) / num_bins]
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=hits.device).scatter_add(0, bins, hits - confidence)
    return float(gaps.abs().sum() / len(hits))


def error_score(confidence: Tensor, hits: Tensor, num_bins: int) -> Score:
    """Return the expected calibration error with its basic bootstrap interval, from 0 to 1.

    Noise within bins adds to the error, and a resample has more of it than the sample: the percentiles of resamples are too
    large, and often all above the error itself. The basic interval, 2 * error - percentiles, takes that bias off. It is
    widened to the error where it would lie below.

    Args:
        confidence: probability of the predicted class, float64 [n].
        hits: 1 for a right prediction, else 0, float64 [n].
        num_bins: number of bins, as in `calibration_error`.
    """
    error = statistic_score(lambda drawn: _error_of_bins(confidence[drawn], hits[drawn], num_bins), len(hits))
    low, high = error.intervals["sample"]
    low, high = np.clip([min(2 * error - high, error), max(2 * error - low, error)], 0, 1).tolist()
    return Score(error, {"sample": (low, high)})


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 that minimises the mean negative log-likelihood of softmax(logits / T).

    The loss is convex in 1 / T, so that its derivative has one root, which bisection finds.

    Args:
        logits: logits of the classes, float64 [n, C].
        labels: true classes, int64 [n].

    Returns: T; NaN if a logit is not finite.
    """
    if not bool(logits.isfinite().all()):  # bisection would end at a bound
        return math.nan
    right = logits.gather(1, labels[:, None])[:, 0]
    low, high = -20.0, 20.0  # of log(1 / T)
    for _ in range(_MAX_ITERATIONS):
        middle = (low + high) / 2
        expected = ((logits * torch.tensor(middle).exp()).softmax(1) * logits).sum(1)
        low, high = (low, middle) if float((expected - right).mean()) > 0 else (middle, high)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())


class Calibration:
    """Compute how well the probabilities of zero-shot classification, softmax(logit_scale * similarity), are calibrated.

    The temperature is fitted on one half of the images and applied to the other, and the other way round.

    Args:
        data: names of `data.val` to use; None uses each data set with `classes` and `label`.
        num_bins: number of bins of the calibration error.

    Raises: UsageError if `num_bins` is below 1.
    """

    needs = "label and classes, several images, and a model with a logit scale"

    def __init__(self, data: Sequence[str] | None = None, num_bins: int = 15) -> None:
        check_number("num_bins", num_bins, at_least=1)
        self.data = data
        self.num_bins = num_bins

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with classes, labels and at least two images; none if the run has no logit_scale."""
        if context.logit_scale is None:
            return []
        return [name for name in context.classified_sets if context.sets[name].shards.num_samples > 1]

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return `ece`, `nll`, and, with a fitted temperature, `ece_scaled`, `nll_scaled` and `temperature`.

        Raises: UsageError if a single image can be read.
        """
        classes, embedded = context.sets[name].classes, context.embedded(name)
        check_several(name, embedded)
        assert classes is not None and context.logit_scale is not None
        weights, labels = class_embeddings(classes, context), embedded.labels
        logits = context.logit_scale * (embedded.images @ weights.T).double()
        scaled, temperatures = torch.empty_like(logits), []
        order = torch.from_numpy(seeds.permutation(seeds.hash64("calibration"), len(labels))).to(labels.device)
        for fitted, applied in (order.tensor_split(2), order.tensor_split(2)[::-1]):
            temperatures.append(best_temperature(logits[fitted], labels[fitted]))
            scaled[applied] = logits[applied] / temperatures[-1]
        return {
            **self._scores(logits, labels, ""),
            **self._scores(scaled, labels, "_scaled"),
            "temperature": sum(temperatures) / 2,
        }

    def _scores(self, logits: Tensor, labels: Tensor, suffix: str) -> dict[str, Score]:
        log_probabilities = logits.log_softmax(1)
        confidence, hits = log_probabilities.amax(1).exp(), (right_class_ranks(logits, labels) < 1).double()
        error = error_score(confidence, hits, self.num_bins)
        losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
        return {f"ece{suffix}": error, f"nll{suffix}": mean_score(losses, labels)}
