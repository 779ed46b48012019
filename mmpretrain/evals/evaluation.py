"""The evaluations of a run: which are due, on which data, each data set embedded once."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.evals.embed import Embedded, EvalSet, embed
from mmpretrain.models.image_text import ImageTextModel


@dataclass
class Context:
    """What an evaluator sees; embeddings are computed when first asked for and kept for the others."""

    model: ImageTextModel
    tokenizer: Tokenizer
    sets: Mapping[str, EvalSet]
    logit_scale: float | None
    batch_size: int
    workers: int
    _embedded: dict[str, Embedded] = field(default_factory=dict)

    def embedded(self, name: str) -> Embedded:
        """The data set `name` in the shared space. A collective the first time."""
        if name not in self._embedded:
            self._embedded[name] = embed(self.model, self.tokenizer, self.sets[name], self.batch_size, self.workers)
        return self._embedded[name]


class Evaluator(Protocol):
    """One evaluation; called on every rank."""

    data: Sequence[str] | None

    def wants(self, context: Context) -> list[str]:
        """The data sets that it is run on when `data` is None."""
        ...

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Its scores on the data set `name`."""
        ...


@torch.no_grad()
def evaluate(
    evaluators: Mapping[str, Evaluator], context: Context, autocast: AbstractContextManager[object]
) -> dict[str, float]:
    """Run evaluators on their data sets: `eval-<data set>/<metric>` -> value. A collective.

    Raises: ValueError if an evaluator names a data set that there is none of.
    """
    scores: dict[str, float] = {}
    was_training = context.model.training
    context.model.eval()
    with autocast:
        for evaluator in evaluators.values():
            for name in chosen_sets(evaluator, context):
                scores |= {f"eval-{name}/{metric}": value for metric, value in evaluator(name, context).items()}
    context.model.train(was_training)
    return scores


def chosen_sets(evaluator: Evaluator, context: Context) -> list[str]:
    """The data sets that an evaluator is run on. Raises: ValueError for a name that is none of them."""
    if evaluator.data is None:
        return evaluator.wants(context)
    for name in evaluator.data:
        if name not in context.sets:
            known = ", ".join(context.sets) or "none"
            raise ValueError(f"an evaluator's data is {name!r}; expected one of data.val: {known}")
    return list(evaluator.data)
