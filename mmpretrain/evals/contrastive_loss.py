"""Held-out contrastive loss with a fixed batch size, to which scaling laws can be fitted."""

from collections.abc import Sequence

import torch

from mmpretrain import distributed
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.losses import info_nce


class ContrastiveLoss:
    """Compute InfoNCE with the run's logit_scale over consecutive batches in the data's order.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        batch_size: number of pairs per batch. An incomplete last batch is dropped unless it is the only one.

    Raises: UsageError if `batch_size` is below 1.
    """

    needs = "caption, and a model with a logit scale"

    def __init__(self, data: Sequence[str] | None = None, batch_size: int = 128) -> None:
        check_number("batch_size", batch_size, at_least=1)
        self.data = data
        self.batch_size = batch_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions; none if the run has no logit_scale."""
        if context.logit_scale is None:
            return []
        return context.pair_sets

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Return `contrastive_loss` of each image paired with its first caption."""
        embedded = context.embedded(name)
        assert context.logit_scale is not None
        texts = embedded.texts[embedded.first_texts]
        size = min(self.batch_size, len(texts))
        scale = torch.tensor(context.logit_scale, device=texts.device)
        starts = range(0, len(texts) - size + 1, size)
        total = torch.zeros((), dtype=torch.float64, device=texts.device)
        for start in starts[distributed.rank() :: distributed.world_size()]:
            total += info_nce(embedded.images[start : start + size], texts[start : start + size], scale)
        return {"contrastive_loss": float(distributed.all_reduce_sum(total)) / len(starts)}
