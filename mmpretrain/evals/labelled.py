"""Features and labels of a data set and of its training split, for evaluators that learn."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context
from mmpretrain.evals.embeddings import Embedded

Features = Literal["pooled", "embedding"]
"""Which features of a sample: the encoder's pooled states before the projection, or its embedding of unit length."""
Tower = Literal["image", "text"]
"""Encoder of the features. A sample with several texts has the features of its first one."""


@dataclass(frozen=True)
class LabelledSplits:
    """Features float32 [n, d] and labels int64 [n] of the two splits, on the model's device."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int

    @classmethod
    def of(cls, name: str, context: Context, features: Features, tower: Tower = "image") -> "LabelledSplits":
        """Embed both splits of the data set `name`. A collective.

        Raises: UsageError if the training split has a single class.
        """
        train, test = context.embedded_train(name), context.embedded(name)
        present = train.labels.unique()
        if len(present) < 2:
            raise UsageError(
                f"data.val.{name}.train has samples of {len(present)} class; expected several, as data.val.{name}.label says"
            )
        num_classes = int(max(train.labels.max(), test.labels.max())) + 1
        train_features, test_features = (features_of(split, features, tower) for split in (train, test))
        return cls(train_features, train.labels, test_features, test.labels, num_classes)


def features_of(embedded: Embedded, features: Features, tower: Tower) -> Tensor:
    """Return the features of an embedded data set, float32 [n, d]."""
    if tower == "image":
        return embedded.features if features == "pooled" else embedded.images
    texts = embedded.text_features if features == "pooled" else embedded.texts
    return texts[embedded.first_texts]
