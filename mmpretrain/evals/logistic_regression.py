"""Multinomial logistic regression with the objective of scikit-learn, for probes of features."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed, seeds
from mmpretrain.errors import UsageError
from mmpretrain.evals.class_scores import right_class_ranks

_HISTORY = 10


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    c: float,
    start: Tensor | None = None,
    max_iterations: int = 1000,
) -> Tensor:
    """Minimise C sum_i CE(W x_i + b, y_i) + |W|^2 / 2 over W and b by L-BFGS. A collective: the ranks share the samples.

    This is scikit-learn's LogisticRegression with the same C: the intercepts b are not penalised, and the iterations end
    when no derivative of the mean loss exceeds 1e-5.

    Args:
        features: features x [n, d], the same on every rank.
        labels: classes y, int64 [n].
        num_classes: number of classes k.
        c: inverse strength C of the regularisation.
        start: weights to start from, as this function returns them; None: zeros.
        max_iterations: largest number of iterations.

    Returns: (W, b) as [k, d + 1], in the dtype of `features`; NaN, for which nothing is a hit, if a feature or a weight of
        `start` is not finite.
    """
    if not all(bool(each.isfinite().all()) for each in (features, start) if each is not None):  # L-BFGS would raise
        return features.new_full((num_classes, features.shape[1] + 1), math.nan)
    share = distributed.share(len(features))
    mine, targets = features[share], F.one_hot(labels[share], num_classes).to(features.dtype)
    shape = (num_classes, features.shape[1] + 1)
    weights = torch.nn.Parameter(features.new_zeros(shape) if start is None else start.clone())
    weights.grad = torch.zeros_like(weights)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=1e-5, tolerance_change=0,
        history_size=_HISTORY, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss_and_gradient() -> Tensor:
        assert weights.grad is not None
        log_probabilities = scores_of(weights, mine).log_softmax(1)
        errors = log_probabilities.exp() - targets
        loss = -(log_probabilities * targets).sum()
        sums = torch.cat([torch.cat([errors.T @ mine, errors.sum(0)[:, None]], dim=1).flatten(), loss[None]])
        means = distributed.all_reduce_sum(sums) / len(features)
        weights.grad.copy_(means[:-1].view(shape))
        penalty = weights.detach()[:, :-1] / (c * len(features))
        weights.grad[:, :-1] += penalty
        return means[-1] + (penalty * weights.detach()[:, :-1]).sum() / 2

    optimizer.step(loss_and_gradient)
    return weights.detach()


def scores_of(weights: Tensor, features: Tensor) -> Tensor:
    """Return W x + b, [n, k], of features [n, d] and weights as `fit` returns them."""
    return torch.addmm(weights.detach()[:, -1], features, weights.detach()[:, :-1].T)


def choose_c(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    candidates: Sequence[float],
    held_out_fraction: float,
    max_iterations: int,
) -> float:
    """Return the candidate C with the highest accuracy on a held-out part of the samples; the smallest one of several.

    The held-out part has `held_out_fraction` of the samples of each class, rounded down, but one at least of two or more;
    they are drawn by a fixed seed. Candidates are tried in ascending order, and the search ends when two in a row are worse
    than the best.

    Raises: UsageError if no class has two samples.
    """
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique().tolist():
        samples = (labels == label).nonzero()[:, 0]
        order = torch.from_numpy(seeds.permutation(seeds.hash64("held out", label), len(samples))).to(samples.device)
        held_out[samples[order[: max(int(held_out_fraction * len(samples)), min(1, len(samples) - 1))]]] = True
    if not bool(held_out.any()):
        raise UsageError(
            f"cs has {len(candidates)} values, but the training split has one sample of each class and none to choose by; "
            "expected two samples of a class, or one value: eval.<name>.cs=[1]"
        )
    best, weights, chosen, num_worse = -1, None, min(candidates), 0
    for c in sorted(candidates):  # from strong to weak regularisation, each from the solution of the one before
        weights = fit(features[~held_out], labels[~held_out], num_classes, c, weights, max_iterations)
        ranks = right_class_ranks(scores_of(weights, features[held_out]), labels[held_out])
        hits = int((ranks < 1).sum())
        num_worse = num_worse + 1 if hits < best else 0
        if hits > best:
            best, chosen = hits, c
        if num_worse == 2:
            break
    return chosen
