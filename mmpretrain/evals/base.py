"""The evaluations of a run: which are due, on which data, each data set embedded once."""

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
from mmpretrain.reporting.metrics import MetricsWriter
from mmpretrain.schedules import Clock, Duration
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class Shown:
    """What evaluators give to be looked at, by `eval-<data set>/<name>`."""

    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """uint8 [h, w, 3]."""
    projections: dict[str, tuple[np.ndarray, Sequence[str], Tensor]] = field(default_factory=dict)
    """(rows float32 [n, e], a label for each, thumbnails uint8 [n, c, h, w])."""


@dataclass
class Context:
    """What an evaluator sees; embeddings are computed when first asked for and kept for the others.

    `autocast` is the precision of the model's passes alone: similarities in bf16 would tie at 1/256.
    """

    model: ImageTextModel
    tokenizer: Tokenizer
    sets: Mapping[str, EvalSet]
    logit_scale: float | None
    batch_size: int
    workers: int
    timeout_seconds: float = 600.0
    """How long a batch may take to be read."""
    check_stop: CheckStop = go_on
    """Called before each batch, by all ranks equally often; what it raises ends the evaluation."""
    autocast: AbstractContextManager[object] = field(default_factory=nullcontext)
    shown: Shown = field(default_factory=Shown)
    _embedded: dict[str, Embedded] = field(default_factory=dict)

    def embedded(self, name: str) -> Embedded:
        """The data set `name` in the shared space. A collective the first time."""
        if name not in self._embedded:
            with self.autocast:
                self._embedded[name] = embed(
                    self.model, self.tokenizer, self.sets[name], self.batch_size, self.workers, self.timeout_seconds,
                    self.check_stop,
                )  # fmt: skip
        return self._embedded[name]

    def image(self, name: str, row: int) -> Tensor:
        """The image of a row of `embedded(name).images` as the model sees it, uint8 [c, h, w]."""
        return read_image(self.sets[name], int(self.embedded(name).samples[row]))

    def show(self, name: str, picture: str, pixels: np.ndarray) -> None:
        """Hand over a picture of the data set `name`, uint8 [h, w, 3]."""
        self.shown.pictures[f"eval-{name}/{picture}"] = pixels

    def project(self, name: str, rows: np.ndarray, labels: Sequence[str], images: Tensor) -> None:
        """Hand over rows of the data set `name` for the projector; see `Shown`."""
        self.shown.projections[f"eval-{name}"] = (rows, labels, images)

    def embedded_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts of the evaluator's own in the shared space, [m, e]. A collective."""
        with self.autocast:
            return embed_texts(self.model, self.tokenizer, texts, self.batch_size, self.check_stop)


class Evaluator(Protocol):
    """One evaluation; called on every rank."""

    data: Sequence[str] | None

    def applicable_datasets(self, context: Context) -> list[str]:
        """The data sets that have what it needs: it is run on `data`, or where that is None on all of them."""
        ...

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Its scores on the data set `name`."""
        ...


@torch.no_grad()
def evaluate(evaluators: Mapping[str, Evaluator], context: Context) -> dict[str, float]:
    """Run evaluators on their data sets: `eval-<data set>/<metric>` -> value. A collective.

    Raises: ValueError if an evaluator names a data set that it cannot be run on.
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
    """The evaluations of a run and when each of them is due."""

    evaluators: Mapping[str, Evaluator]
    every: Mapping[str, Duration]
    clock: Clock
    context: Callable[[Task, CheckStop], Context]
    """(the task with all of its weights, `check_stop`) -> what evaluators see."""

    def due(self, before: int, after: int, is_last: bool) -> list[str]:
        """The evaluators that a step from `before` to `after` samples brings."""
        return [name for name in self.evaluators if is_last or self.clock.is_due(self.every[name], before, after)]

    def run(
        self, names: Sequence[str], task: Task, samples: int, writer: MetricsWriter | None, check_stop: CheckStop
    ) -> Mapping[str, float]:
        """The scores of some evaluators, whose pictures go to `writer`. A collective.

        Raises: what `check_stop` does.
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
    """The data sets that the evaluator `name` is run on.

    Raises: ValueError for one that it cannot be run on, and for a model of one tower.
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
