"""Losses of a run's objectives on held-out samples: the perplexity of language models, the error of reconstructions."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.held_out_batches import blocks, in_evaluation_mode, needed_fields
from mmpretrain.objectives.base import IndependentObjective, hooks_of
from mmpretrain.scores import Score, statistic_score
from mmpretrain.training.task import Encodings

_MIN_BLOCKS = 10
_RESAMPLES = 1000


class HeldOutLoss:
    """Compute the losses of objectives whose samples are independent, such as MLM, MAE and captioning.

        loss = sum of the loss over the terms of all samples / number of terms;    perplexity = exp(loss)

    Masks are drawn as in training, from seeds that depend on a sample's index alone. Scheduled mask ratios have their last
    value. Each sample has its first caption. The scores do not depend on ranks or batch sizes.

    The confidence intervals resample blocks of consecutive samples.

    Args:
        data: names of `data.val` to use; None uses each data set with what an objective reads.
        objectives: names of the objectives; None uses all whose samples are independent, and that read no views.
        block_size: number of samples that are computed at once, and are a unit of the intervals.

    Raises: UsageError if `block_size` is below 1.
    """

    towers: tuple[str, ...] = ()

    needs = "a run with an independent objective, such as mae or mlm, and what it reads"

    def __init__(
        self, data: Sequence[str] | None = None, objectives: Sequence[str] | None = None, block_size: int = 16
    ) -> None:
        check_number("block_size", block_size, at_least=1)
        self.data = data
        self.objectives = objectives
        self.block_size = block_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets that have what one of the objectives reads: images, captions, labels of its classes."""
        chosen = [(objective, needed_fields(objective, context)) for objective in self._chosen(context).values()]
        return [name for name in context.sets if any(_has(name, context, *each) for each in chosen)]

    def _chosen(self, context: Context) -> dict[str, IndependentObjective]:
        possible = {
            name: objective
            for name, objective in context.objectives.items()
            if isinstance(objective, IndependentObjective) and not hooks_of(objective).num_views
        }
        if self.objectives is None:
            return possible
        for name in self.objectives:
            if name not in possible:
                known = ", ".join(possible) or "the run has none"
                raise UsageError(
                    f"objectives has {name!r}; expected objectives of the run whose samples are independent: {known}"
                )
        return {name: possible[name] for name in self.objectives}

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `<objective>_loss`, and `_perplexity`, `_accuracy` and other sums per term if the objective has them."""
        scores: dict[str, Score] = {}
        for key, objective in self._chosen(context).items():
            fields = needed_fields(objective, context)
            if not _has(name, context, objective, fields):
                continue
            counts, sums = self._sums(name, context, objective, fields)
            if not (counts.sum() > 0):
                raise UsageError(
                    f"data.val.{name}: {key} has no terms on it, such as hidden tokens; expected more samples"
                )
            for metric, values in sums.items():
                scores[f"{key}_{metric}"] = _ratio(values, counts)
            if hooks_of(objective).perplexity:
                scores[f"{key}_perplexity"] = _exp(scores[f"{key}_loss"])
        return scores

    def _sums(
        self, name: str, context: Context, objective: IndependentObjective, fields: Collection[str]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the number of terms of each block, float64 [blocks], and the sums over them, by metric. A collective."""
        local: list[tuple[float, dict[str, float]]] = []
        read = blocks(name, context, objective.streams, fields, self.block_size)
        with closing(read), context.autocast, in_evaluation_mode(context.model, objective):
            for block in read:
                if not block.numbers:
                    continue
                count = objective.count(block.batch).item()
                encodings = Encodings(context.model, block.batch.to(context.model.device), {objective: int(count)})
                terms = objective.loss(encodings)
                loss, others = terms if isinstance(terms, tuple) else (terms, {})
                local.append((count, {metric: float(value) for metric, value in {"loss": loss, **others}.items()}))
        # Blocks come in the data's order from any number of ranks, so that their sum is the same, too.
        found = [each for part in distributed.gather_objects(local) for each in part]
        counts = torch.tensor([count for count, _ in found], dtype=torch.float64)
        metrics = found[0][1] if found else {}
        return counts, {
            metric: torch.tensor([sums[metric] for _, sums in found], dtype=torch.float64) for metric in metrics
        }


def _has(name: str, context: Context, objective: IndependentObjective, fields: Collection[str]) -> bool:
    """Return True if a data set has all of the fields that an objective reads, with labels of its classes."""
    classes, names = context.sets[name].classes, hooks_of(objective).class_names
    is_other = classes is not None and names is not None and list(classes.names) != list(names)
    labelled = [each for each, data in context.sets.items() if data.label is not None and not is_other]
    sets = {"images": context.image_sets, "texts": context.captioned_sets, "labels": labelled}
    return all(name in sets[field] for field in fields)


def _ratio(sums: Tensor, counts: Tensor) -> Score:
    """Return the ratio of two sums over blocks, with an interval if there are enough blocks."""
    if len(counts) < _MIN_BLOCKS:
        return Score(float(sums.sum() / counts.sum()))
    return statistic_score(lambda drawn: float(sums[drawn].sum() / counts[drawn].sum()), len(counts), _RESAMPLES)


def _exp(score: Score) -> Score:
    def exp(value: float) -> float:
        return math.exp(value) if value < 700 else math.inf  # exp(710) overflows

    return Score(exp(score), {unit: (exp(low), exp(high)) for unit, (low, high) in score.intervals.items()})
