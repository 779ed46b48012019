"""Choice between captions that differ in composition: the forms of SugarCrepe, ARO and Winoground."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context
from mmpretrain.scores import Score, mean_score


class Choice:
    """Compute how often an image is more similar to its own caption than to wrong ones. A tie is wrong.

    A sample has its captions, of which the first counts, and either wrong ones, as SugarCrepe (Hsieh et al. 2023) and ARO
    (Yuksekgonul et al. 2023) have them, or the name of a pair of samples whose captions are wrong for each other, as
    Winoground (Thrush et al. 2022) has them:

        data.val.NAME.fields={negatives: json.negative_captions}     # a text or a list of texts
        data.val.NAME.fields={pair: json.id}                         # the same value in two samples

    Args:
        data: names of `data.val` to use; None uses each data set with captions and one of these fields.
    """

    needs = "caption, and fields.negatives or fields.pair"

    def __init__(self, data: Sequence[str] | None = None) -> None:
        self.data = data

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions and wrong captions, or pairs."""
        possible = {*context.sets_with("negatives"), *context.sets_with("pair")}
        return [name for name in context.pair_sets if name in possible]

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `choice_acc` of data with `negatives`; `winoground_text`, `_image` and `_group` of data with `pair`."""
        embedded = context.embedded(name)
        texts = embedded.texts[embedded.first_texts]
        scores = {}
        if "negatives" in embedded.fields:
            is_right = self._choices(name, context, embedded.images, texts, embedded.fields["negatives"])
            scores["choice_acc"] = mean_score(is_right, embedded.labels)
        if "pair" in embedded.fields:
            scores |= _pairs(name, embedded.images, texts, embedded.fields["pair"])
        return scores

    def _choices(self, name: str, context: Context, images: Tensor, texts: Tensor, negatives: Sequence[Any]) -> Tensor:
        """Return whether each image is nearer to its own text than to all wrong ones, bool [n]. A collective."""
        wrong = [[each] if isinstance(each, str) else each for each in negatives]
        for each in wrong:
            if not (isinstance(each, list) and each and all(isinstance(text, str) for text in each)):
                raise UsageError(f"data.val.{name}.fields.negatives: {each!r}; expected a text, or a list of texts")
        rows = context.embedded_texts([text for each in wrong for text in each])
        owners = torch.tensor([i for i, each in enumerate(wrong) for _ in each], device=rows.device)
        right = (images * texts).sum(1)
        is_beaten = ~((images[owners] * rows).sum(1) < right[owners])  # NaN counts against the model, too
        num_beaten = torch.zeros(len(images), device=rows.device).index_add(0, owners, is_beaten.float())
        return num_beaten == 0


def _pairs(name: str, images: Tensor, texts: Tensor, pairs: Sequence[Any]) -> dict[str, Score]:
    """Return Winoground's scores of pairs of samples (Thrush et al. 2022, equations 1 to 3).

    Raises: UsageError if a value does not occur in two samples.
    """
    members: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        members.setdefault(str(pair), []).append(row)
    for pair, rows in members.items():
        if len(rows) != 2:
            raise UsageError(f"data.val.{name}.fields.pair: {pair!r} occurs in {len(rows)} samples; expected two")
    a, b = torch.tensor(list(members.values()), device=images.device).unbind(1)
    aa, bb = (images[a] * texts[a]).sum(1), (images[b] * texts[b]).sum(1)
    ab, ba = (images[a] * texts[b]).sum(1), (images[b] * texts[a]).sum(1)  # image a with text b, and the reverse
    by_text, by_image = (aa > ab) & (bb > ba), (aa > ba) & (bb > ab)
    return {
        "winoground_text": mean_score(by_text),
        "winoground_image": mean_score(by_image),
        "winoground_group": mean_score(by_text & by_image),
    }
