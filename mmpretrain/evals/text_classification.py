"""Classification of texts: logistic regression on frozen features of the text encoder."""

from collections.abc import Sequence

from mmpretrain.evals.base import Context
from mmpretrain.evals.labelled import Features, LabelledSplits
from mmpretrain.evals.linear_probe import CS, Probe
from mmpretrain.scores import Score


class TextClassification:
    """Fit a linear classifier to the training split's texts, and score it on the data set, as `LinearProbe` does.

    The samples have texts and labels, and no images:

        data.val.NAME={shards: test, images: false, caption: txt, label: cls, train: {shards: train}}

    Args:
        data: names of `data.val` to use; None uses each data set with texts, labels and a training split, and no images.
        features: `pooled`, the text encoder's states before the projection, or `embedding`, of unit length.
        cs: inverse strengths of the regularisation, from which the best on a held-out part of the training split is
            chosen. One value is taken as it is.
        held_out_fraction: fraction of each class of the training split that decides on C; one sample at least of two or more.
        max_iterations: largest number of L-BFGS's iterations.

    Raises: UsageError if `cs` is empty, or a value is out of range.
    """

    towers = ("text",)

    def __init__(
        self,
        data: Sequence[str] | None = None,
        features: Features = "pooled",
        cs: Sequence[float] = CS,
        held_out_fraction: float = 0.2,
        max_iterations: int = 1000,
    ) -> None:
        self.data = data
        self.features = features
        self.probe = Probe(cs, held_out_fraction, max_iterations)

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with texts, labels and a training split, and without images."""
        return context.trainable_text_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return `text_classification_acc1`, `_acc5`, `_mean_per_class_recall`, and the chosen `text_classification_c`.

        With five classes or fewer there is no `_acc5`, which would be 1.
        """
        splits = LabelledSplits.of(name, context, self.features, "text")
        scores = self.probe.scores(splits, "text_classification_")
        if splits.num_classes <= 5:
            del scores["text_classification_acc5"]
        return scores
