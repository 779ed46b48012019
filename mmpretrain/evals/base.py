"""Evaluations of a run: their schedule and data sets. Each data set is embedded once."""

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.evals.embeddings import CheckStop, Embedded, EvalSet, embed, embed_texts, go_on, read_image
from mmpretrain.models.image_text import ImageTextModel, NoImages
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.schedules import Clock, Duration
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class Shown:
    """Visual output of evaluators: pictures by `eval-<data set>/<name>`, and projections by `eval-<data set>`."""

    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """Pictures, uint8 [h, w, 3]."""
    projections: dict[str, tuple[np.ndarray, Sequence[str], Tensor]] = field(default_factory=dict)
    """Tuples (rows float32 [n, e], label of each row, thumbnails uint8 [n, c, h, w])."""


@dataclass
class Context:
    """Input of the evaluators. Embeddings are computed on first use and cached for other evaluators.

    `autocast` applies only to the model's passes: in bf16 similarities would be rounded to about 1/256 and tie.
    """

    model: ImageTextModel
    tokenizer: Tokenizer
    sets: Mapping[str, EvalSet]
    logit_scale: float | None
    batch_size: int
    workers: int
    timeout_seconds: float = 600.0
    """Longest time that reading a batch may take, in seconds."""
    check_stop: CheckStop = go_on
    """Function called before each batch, equally often on all ranks. An exception that it raises ends the evaluation."""
    autocast: AbstractContextManager[object] = field(default_factory=nullcontext)
    shown: Shown = field(default_factory=Shown)
    _embedded: dict[str, Embedded] = field(default_factory=dict)

    def embedded(self, name: str) -> Embedded:
        """Return the embeddings of the data set `name`. The first call is a collective."""
        if name not in self._embedded:
            with self.autocast:
                self._embedded[name] = embed(
                    self.model, self.tokenizer, self.sets[name], self.batch_size, self.workers, self.timeout_seconds,
                    self.check_stop,
                )  # fmt: skip
        return self._embedded[name]

    def image(self, name: str, row: int) -> Tensor:
        """Return the preprocessed image of a row of `embedded(name).images`, uint8 [c, h, w]."""
        return read_image(self.sets[name], int(self.embedded(name).samples[row]))

    def show(self, name: str, picture: str, pixels: np.ndarray) -> None:
        """Add a picture of the data set `name`, uint8 [h, w, 3]."""
        self.shown.pictures[f"eval-{name}/{picture}"] = pixels

    def project(self, name: str, rows: np.ndarray, labels: Sequence[str], images: Tensor) -> None:
        """Add rows of the data set `name` for the embedding projector (see `Shown.projections`)."""
        self.shown.projections[f"eval-{name}"] = (rows, labels, images)

    def embedded_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed an evaluator's own texts, [m, e]. A collective."""
        with self.autocast:
            return embed_texts(self.model, self.tokenizer, texts, self.batch_size, self.check_stop)


class Evaluator(Protocol):
    """Protocol of an evaluation, which is called on every rank. `data` names its data sets; None uses all applicable ones."""

    data: Sequence[str] | None

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the names of the data sets that have the fields that this evaluation needs."""
        ...

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Return the scores on the data set `name`, by metric."""
        ...


@torch.no_grad()
def evaluate(evaluators: Mapping[str, Evaluator], context: Context) -> dict[str, float]:
    """Run evaluators on their data sets. A collective.

    Returns: values by `eval-<data set>/<metric>`.
    Raises: ValueError if an evaluator names a data set that is not applicable.
    """
    scores: dict[str, float] = {}
    was_training = context.model.training
    context.model.eval()
    try:
        for name, evaluator in evaluators.items():
            for data in chosen_sets(name, evaluator, context):
                context.check_stop()
                scores |= {f"eval-{data}/{metric}": value for metric, value in evaluator(data, context).items()}
    finally:
        context.model.train(was_training)
    return scores


@dataclass(frozen=True)
class Evaluation:
    """Evaluations of a run with the interval of each."""

    evaluators: Mapping[str, Evaluator]
    every: Mapping[str, Duration]
    clock: Clock
    context: Callable[[Task, CheckStop], Context]
    """Function from (unsharded task, `check_stop`) to the evaluators' context."""

    def due(self, before: int, after: int, is_last: bool) -> list[str]:
        """Return the names of the evaluators that are due after a step from `before` to `after` samples."""
        return [name for name in self.evaluators if is_last or self.clock.is_due(self.every[name], before, after)]

    def run(
        self, names: Sequence[str], task: Task, samples: int, writer: RunWriter | None, check_stop: CheckStop
    ) -> Mapping[str, float]:
        """Run the evaluators `names`, write their pictures with `writer`, and return their scores. A collective.

        Raises: any exception of `check_stop`.
        """
        context = self.context(task, check_stop)
        scores = evaluate({name: self.evaluators[name] for name in names}, context)
        if writer is not None:
            for name, picture in context.shown.pictures.items():
                writer.image(name, samples, picture)
            for name, projection in context.shown.projections.items():
                writer.embeddings(name, samples, *projection)
        return scores


def chosen_sets(name: str, evaluator: Evaluator, context: Context) -> list[str]:
    """Return the data sets of the evaluator `name`.

    Raises: ValueError if its `data` names a data set that is not applicable, or if the model lacks a tower.
    """
    for tower, module in (("image", context.model.image), ("text", context.model.text)):
        if module is None or isinstance(module, NoImages):
            raise ValueError(f"eval.{name} embeds images and texts, but model.{tower} is null; leave it out: eval=[]")
    possible = evaluator.applicable_datasets(context)
    if evaluator.data is None:
        if not possible:
            log.warning("eval.%s finds no data set in data.val that has what it needs; it gives no score", name)
        return possible
    for data in evaluator.data:
        if data not in possible:
            known = ", ".join(possible) or "there is none"
            lack = "lacks what it needs" if data in context.sets else "is not in data.val"
            raise ValueError(f"eval.{name}.data has {data!r}, which {lack}; expected one of: {known}")
    return list(evaluator.data)


def check_best(metric: str | None, evaluated: Set[str]) -> None:
    """Check the data set in `checkpoint.best`.

    Args:
        metric: `eval-<data set>/<name>`, or `eval-<data set>-ema/<name>` for the averaged weights.
        evaluated: names of the data sets that some evaluator is run on.

    Raises: ValueError if no evaluation can give the metric.
    """
    possible = {f"eval-{name}{average}" for name in evaluated for average in ("", "-ema")}
    if metric is not None and metric.partition("/")[0] not in possible:
        raise ValueError(
            f"checkpoint.best is {metric!r}; expected eval-<data set>/<metric> of a data set that is evaluated: "
            f"{', '.join(sorted(evaluated)) or 'there is none'}"
        )
