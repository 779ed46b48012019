"""Accuracy of the classifiers that a model was trained with."""

from collections.abc import Sequence

import torch

from mmpretrain.data.classes import first_other
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.evals.labelled import features_of
from mmpretrain.models.evaluation_mode import in_evaluation_mode
from mmpretrain.objectives.classification import Classification
from mmpretrain.scores import Score


class Classifier:
    """Score each objective `Classification` of the run on held-out data.

    Args:
        data: names of `data.val` to use; None uses each data set with labels, and images or texts as an objective reads.
        chunk_size: number of samples classified at once; memory is proportional to chunk_size x number of classes.

    Raises: UsageError if `chunk_size` is below 1.
    """

    needs = "label, and a run with objective=classification"
    towers = ()

    def __init__(self, data: Sequence[str] | None = None, chunk_size: int = 4096) -> None:
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with labels that an objective can classify.

        Raises: UsageError if one of those to be used has other classes than the objective.
        """
        possible = {name: found for name in context.sets if (found := _classifiers(name, context))}
        for name, objectives in possible.items():
            if self.data is None or name in self.data:
                for objective_name, objective in objectives.items():
                    _check_classes(name, context, objective_name, objective)
        return list(possible)

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `<objective>_acc1`, `_acc5` of more than five classes, and `_mean_per_class_recall`.

        Raises: UsageError if the data set has a label that is none of the objective's classes.
        """
        embedded = context.embedded(name)
        scores: dict[str, Score] = {}
        for objective_name, objective in _classifiers(name, context).items():
            if len(embedded.labels) and int(embedded.labels.max()) >= objective.num_classes:
                raise UsageError(
                    f"data.val.{name} has label {int(embedded.labels.max())}, but objective.{objective_name} predicts "
                    f"{objective.num_classes} classes; expected labels of the training data"
                )
            features = features_of(embedded, objective.features, objective.tower)
            with in_evaluation_mode(objective):
                ranks = [
                    right_class_ranks(objective.logits(rows), labels)
                    for rows, labels in zip(features.split(self.chunk_size), embedded.labels.split(self.chunk_size))
                ]
            scores |= class_scores(torch.cat(ranks), embedded.labels, objective.num_classes, f"{objective_name}_")
        return scores


def _check_classes(name: str, context: Context, objective_name: str, objective: Classification) -> None:
    """Raises: UsageError if a data set has another list of classes than the objective."""
    classes = context.sets[name].classes
    if classes is None or objective.class_names is None:
        return
    ours, theirs = list(objective.class_names), list(classes.names)
    if ours != theirs:
        number, own, other = first_other(ours, theirs)
        raise UsageError(
            f"data.val.{name}.classes has {len(theirs)} classes with {other} as number {number}, but "
            f"objective.{objective_name} was trained on {len(ours)} with {own}; expected the same list: that of data.train"
        )


def _classifiers(name: str, context: Context) -> dict[str, Classification]:
    """Return the objectives that can classify the samples of a data set, by name."""
    if context.sets[name].label is None:
        return {}
    towers = [tower for tower, sets in (("image", context.image_sets), ("text", context.text_sets)) if name in sets]
    return {
        key: each
        for key, each in context.objectives.items()
        if isinstance(each, Classification) and each.tower in towers
    }
