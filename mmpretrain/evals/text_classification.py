"""Classification of texts: logistic regression on frozen features of the text encoder."""

from mmpretrain.evals.base import Context
from mmpretrain.evals.labelled import LabelledSplits
from mmpretrain.evals.linear_probe import LinearProbe
from mmpretrain.scores import Score


class TextClassification(LinearProbe):
    """Fit a linear classifier to the training split's texts, and score it on the data set, as `LinearProbe` does.

    The samples have texts and labels, and no images:

        data.val.NAME={shards: test, images: false, caption: txt, label: cls, train: {shards: train}}

    The arguments are those of `LinearProbe`, except for these:

    Args:
        data: names of `data.val` to use; None uses each data set with texts, labels and a training split, and no images.
        features: `pooled`, the text encoder's states before the projection, or `embedding`, of unit length.
    """

    needs = "caption, label, train.shards and images=false"
    towers = ("text",)

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with texts, labels and a training split, and without images."""
        return context.trainable_text_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return `text_classification_acc1`, and the other scores of `LinearProbe` under that beginning."""
        return self._scores(LabelledSplits.of(name, context, self.features, "text"), "text_classification_")
