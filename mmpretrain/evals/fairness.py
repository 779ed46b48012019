"""Scores of groups of samples, such as countries or skin tones, and the gap between them."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.retrieval import match_ranks
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score, mean_score

log = logging.getLogger(__name__)


class Fairness:
    """Compute the score of each group of images: zero-shot accuracy, or else recall at 1 of the images' captions.

    The groups are the values of a field of json: `data.val.NAME.fields={group: json.country}`. Null is no group.

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

        Raises: UsageError if two groups have the same name in a metric's name, where a slash is an underscore.
        """
        embedded = context.embedded(name)
        metric, hits = self._hits(name, context)
        groups = _groups(name, embedded.fields["group"])
        scores: dict[str, Score | float] = {
            f"group_{metric}_{group}": mean_score(hits[rows])
            for group, rows in sorted(groups.items())
            if len(rows) >= self.min_samples
        }
        if not scores:
            if distributed.is_main():
                log.warning(
                    "data.val.%s: no group has eval.fairness.min_samples = %d images; the largest has %d",
                    name, self.min_samples, max(map(len, groups.values()), default=0),
                )  # fmt: skip
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


def _groups(name: str, values: Sequence[Any]) -> dict[str, list[int]]:
    """Return the images of each group by its name in metrics. An image whose group is null is in none."""
    groups: dict[str, tuple[Any, list[int]]] = {}
    for row, value in enumerate(values):
        if value is None:
            continue
        shown = str(value).replace("/", "_")  # metrics are folded at a slash
        first, rows = groups.setdefault(shown, (value, []))
        if repr(value) != repr(first):  # 1 and "1", and 1 and true, differ
            raise UsageError(
                f"data.val.{name}.fields.group: {first!r} and {value!r} are both named {shown} in metrics; expected groups "
                "with names of their own: rename one of them in the data"
            )
        rows.append(row)
    return {shown: rows for shown, (_, rows) in groups.items()}
