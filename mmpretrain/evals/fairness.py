"""Scores of groups of samples, such as countries or skin tones, and the gap between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.retrieval import match_ranks
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score, mean_score


class Fairness:
    """Compute the score of each group of images: zero-shot accuracy, or else recall at 1 of the images' captions.

    The groups are the values of a field of json: `data.val.NAME.fields={group: json.country}`.

    Args:
        data: names of `data.val` to use; None uses each data set with the field, and classes or captions.
        min_samples: smallest number of images of a group; smaller ones have no score.

    Raises: UsageError if `min_samples` is below 1.
    """

    needs = "fields.group, and label and classes, or caption"

    def __init__(self, data: Sequence[str] | None = None, min_samples: int = 10) -> None:
        check_number("min_samples", min_samples, at_least=1)
        self.data = data
        self.min_samples = min_samples

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with the field `group`, and classes or captions."""
        possible = {*context.classified_sets, *context.pair_sets}
        return [name for name in context.sets_with("group") if name in possible]

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return `group_<metric>_<group>` of each group, `worst_group_<metric>`, and the difference of best and worst.

        The metric is `acc1` or `text_retrieval_recall@1`, and the difference `group_<metric>_gap`. A group of fewer images
        than `min_samples` is left out; without any group there is no score.
        """
        embedded = context.embedded(name)
        metric, hits = self._hits(name, context)
        groups = [str(group).replace("/", "_") for group in embedded.fields["group"]]  # metrics are folded at a slash
        scores: dict[str, Score | float] = {}
        for group in sorted(set(groups)):
            rows = torch.tensor([i for i, each in enumerate(groups) if each == group], device=hits.device)
            if len(rows) >= self.min_samples:
                scores[f"group_{metric}_{group}"] = mean_score(hits[rows])
        if not scores:
            return {}
        worst, best = min(scores.values()), max(scores.values())
        return {**scores, f"worst_group_{metric}": worst, f"group_{metric}_gap": float(best) - float(worst)}

    def _hits(self, name: str, context: Context) -> tuple[str, Tensor]:
        """Return the metric's name and whether each image is a hit, bool [n]."""
        classes, embedded = context.sets[name].classes, context.embedded(name)
        if name in context.classified_sets:
            assert classes is not None
            similarities = embedded.images @ class_embeddings(classes, context).T
            return "acc1", right_class_ranks(similarities, embedded.labels) < 1
        return "text_retrieval_recall@1", match_ranks(embedded.images, embedded.texts, embedded.pairs) < 1
