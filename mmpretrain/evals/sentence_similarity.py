"""Semantic textual similarity: correlation of the texts' cosine similarities with people's scores (Cer et al. 2017)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context
from mmpretrain.scores import Score, statistic_score

_RESAMPLES = 1000


class SentenceSimilarity:
    """Compute how well the cosine similarity of two sentences agrees with a score, as MTEB does (Muennighoff et al. 2023).

    The first sentence is a sample's caption. The second one and the score are fields of json:

        data.val.NAME={shards: sts, images: false, caption: json.sentence1,
            fields: {sentence2: json.sentence2, similarity: json.score}}

    Args:
        data: names of `data.val` to use; None uses each data set with captions and both fields.
    """

    needs = "caption, fields.sentence2 and fields.similarity"
    towers = ("text",)

    def __init__(self, data: Sequence[str] | None = None) -> None:
        self.data = data

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions and the fields `sentence2` and `similarity`."""
        needed = {"sentence2", "similarity"}
        return [name for name in context.captioned_sets if needed <= context.sets[name].fields.keys()]

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `sts_spearman` and `sts_pearson`, from -1 to 1. They are 0 if all similarities are equal, or one is NaN.

        Raises: UsageError if a field has another type, or all scores are equal.
        """
        embedded = context.embedded(name)
        second = _sentences(name, embedded.fields["sentence2"])
        gold = _scores(name, embedded.fields["similarity"])
        # Equal sentences have one embedding, and float32 drops the last bits of float64: equal pairs are ties.
        number = {text: i for i, text in enumerate(dict.fromkeys([*embedded.captions, *second]))}
        others = context.embedded_texts(list(number)[len(embedded.captions) :])
        rows = torch.cat([embedded.texts, others]).double()
        pairs = rows[embedded.first_texts], rows[[number[text] for text in second]]
        similarities = F.cosine_similarity(*pairs).float().double().cpu()
        ranked = _Ranked(similarities), _Ranked(gold)
        return {
            "sts_spearman": statistic_score(
                lambda drawn: pearson(*(each.ranks(drawn) for each in ranked)), len(gold), _RESAMPLES
            ),
            "sts_pearson": statistic_score(
                lambda drawn: pearson(similarities[drawn], gold[drawn]), len(gold), _RESAMPLES
            ),
        }


def pearson(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of two variables float64 [n]; 0 if one of them is constant or has a NaN."""
    if bool((x == x[0]).all() or (y == y[0]).all() or (x + y).isnan().any()):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(((x / x.norm()) @ (y / y.norm())).clamp(-1, 1))


class _Ranked:
    """Ranks of samples drawn from values float64 [n]. Equal values have the average of their ranks; NaN stays NaN."""

    def __init__(self, values: Tensor) -> None:
        _, self._places = values.unique(return_inverse=True)  # sorted
        self._has_nan = bool(values.isnan().any())

    def ranks(self, drawn: Tensor) -> Tensor:
        """Return the ranks float64 [m] among the samples of indices int64 [m]."""
        places = self._places[drawn]
        counts = places.bincount().double()
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]
        return ranks.fill_(math.nan) if self._has_nan else ranks


def _sentences(name: str, values: Sequence[Any]) -> list[str]:
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"data.val.{name}.fields.sentence2: {value!r}; expected a sentence")
    return [value.strip() for value in values]  # as captions are


def _scores(name: str, values: Sequence[Any]) -> Tensor:
    """Return the values as float64 [n]; they may be texts, as tables without types have them."""
    scores = []
    for value in values:
        try:
            scores.append(float(value))
        except (TypeError, ValueError, OverflowError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise UsageError(f"data.val.{name}.fields.similarity: {value!r}; expected a number")
    if len(set(scores)) == 1:
        raise UsageError(
            f"data.val.{name}.fields.similarity is {scores[0]:g} of each sample; expected different scores"
        )
    return torch.tensor(scores, dtype=torch.float64)
