"""Linear probe: logistic regression on frozen features of the training split, as in CLIP (Radford et al. 2021, A.3)."""

from collections.abc import Sequence

from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.evals.labelled import Features, LabelledSplits
from mmpretrain.evals.logistic_regression import choose_c, fit, scores_of
from mmpretrain.scores import Score

CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6)
"""Default candidates of the inverse strength C."""


class LinearProbe:
    """Fit a linear classifier to the training split's features, and score it on the data set.

    The classifier is that of scikit-learn's `LogisticRegression(C=c)` on the same features.

    Args:
        data: names of `data.val` to use; None uses each data set with labels and a training split.
        features: `pooled`, the encoder's states before the projection, or `embedding`, of unit length in the shared space.
        cs: inverse strengths of the regularisation, from which the best on a held-out part of the training split is
            chosen. One value is taken as it is.
        held_out_fraction: fraction of each class of the training split that decides on C; one sample at least of two or more.
        max_iterations: largest number of L-BFGS's iterations.

    Raises: UsageError if `cs` is empty, or a value is out of range.
    """

    needs = "label and train.shards"
    towers: Sequence[str] = ("image",)

    def __init__(
        self,
        data: Sequence[str] | None = None,
        features: Features = "pooled",
        cs: Sequence[float] = CS,
        held_out_fraction: float = 0.2,
        max_iterations: int = 1000,
    ) -> None:
        if not cs:
            raise UsageError("cs is []; expected at least one strength, such as cs=[0.01,1]")
        for c in cs:
            check_number("cs", c, above=0)
        check_number("held_out_fraction", held_out_fraction, above=0, below=1)
        check_number("max_iterations", max_iterations, at_least=1)
        self.data = data
        self.features = features
        self.cs = cs
        self.held_out_fraction = held_out_fraction
        self.max_iterations = max_iterations

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with labels and a training split."""
        return context.trainable_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return `linear_probe_acc1`, `_acc5` of more than five classes, `_mean_per_class_recall`, and the chosen `_c`.

        Raises: UsageError if there are several `cs`, and no class of the training split has two images.
        """
        return self._scores(LabelledSplits.of(name, context, self.features), "linear_probe_")

    def _scores(self, splits: LabelledSplits, prefix: str) -> dict[str, Score | float]:
        """Fit the classifier, and return its scores and the chosen `c`. A collective."""
        train, labels, num_classes = splits.train, splits.train_labels, splits.num_classes
        c = self.cs[0]
        if len(self.cs) > 1:
            c = choose_c(train, labels, num_classes, self.cs, self.held_out_fraction, self.max_iterations)
        weights = fit(train, labels, num_classes, c, max_iterations=self.max_iterations)
        ranks = right_class_ranks(scores_of(weights, splits.test), splits.test_labels)
        return {**class_scores(ranks, splits.test_labels, num_classes, prefix), f"{prefix}c": c}
