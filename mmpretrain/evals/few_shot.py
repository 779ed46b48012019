"""Few-shot classification: linear probes on a few labelled images of each class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import seeds
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.labelled import Features, LabelledSplits
from mmpretrain.evals.logistic_regression import fit, scores_of
from mmpretrain.scores import Score, mean_score


class FewShot:
    """Fit linear classifiers to a few images of each class of the training split, and average their accuracies.

    The classifier is that of scikit-learn's `LogisticRegression(C=c)` on features of unit length. Images are drawn by a
    fixed seed, and those of fewer shots are among those of more.

    Args:
        data: names of `data.val` to use; None uses each data set with labels and a training split.
        features: `pooled`, the encoder's states before the projection, or `embedding`, in the shared space.
        shots: numbers of images of each class; a class with fewer has all of its images.
        num_draws: number of draws of the images that are averaged.
        c: inverse strength of the regularisation.

    Raises: UsageError if `shots` is empty, or a value is out of range.
    """

    needs = "label and train.shards"
    towers = ("image",)

    def __init__(
        self,
        data: Sequence[str] | None = None,
        features: Features = "pooled",
        shots: Sequence[int] = (1, 2, 4, 8, 16),
        num_draws: int = 3,
        c: float = 1.0,
    ) -> None:
        if not shots:
            raise UsageError("shots is []; expected at least one number, such as shots=[1,16]")
        for number in shots:
            check_number("shots", number, at_least=1)
        check_number("num_draws", num_draws, at_least=1)
        check_number("c", c, above=0)
        self.data = data
        self.features = features
        self.shots = shots
        self.num_draws = num_draws
        self.c = c

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with labels and a training split."""
        return context.trainable_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `few_shot_acc1@k` for each number of shots k: the mean over the draws."""
        splits = LabelledSplits.of(name, context, self.features)
        train, test = F.normalize(splits.train, dim=-1), F.normalize(splits.test, dim=-1)
        order = [drawn_order(splits.train_labels, draw) for draw in range(self.num_draws)]
        scores = {}
        for shots in self.shots:
            hits = test.new_zeros(len(test), dtype=torch.float64)
            for place in order:
                chosen = place < shots
                weights = fit(train[chosen], splits.train_labels[chosen], splits.num_classes, self.c)
                hits += right_class_ranks(scores_of(weights, test), splits.test_labels) < 1
            scores[f"few_shot_acc1@{shots}"] = mean_score(hits / self.num_draws, splits.test_labels)
        return scores


def drawn_order(labels: Tensor, draw: int) -> Tensor:
    """Return the place of each sample in a random order of its class, int64 [n]: below k are k shots of each class."""
    place = torch.zeros_like(labels)
    for label in labels.unique().tolist():
        samples = (labels == label).nonzero()[:, 0]
        order = torch.from_numpy(seeds.permutation(seeds.hash64("shots", draw, label), len(samples))).to(labels.device)
        place[samples[order]] = torch.arange(len(samples), device=labels.device)
    return place
