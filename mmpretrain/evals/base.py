"""Evaluations of a run: their schedule and data sets. Each data set is embedded once."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmpretrain.data.source import selected
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import UsageError, misspelt
from mmpretrain.evals.embedding_cache import EmbeddingCache
from mmpretrain.evals.embeddings import CheckStop, Embedded, EvalSet, embed, embed_texts, go_on, read_image
from mmpretrain.models.evaluation_mode import in_evaluation_mode
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Objective
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.schedules import Clock, Duration
from mmpretrain.scores import Score
from mmpretrain.training.task import Task

_TOWERS = ("image", "text")
_WITHOUT = {"text": "linear_probe,knn,few_shot", "image": "text_classification,sentence_similarity"}
"""Evaluators that need one encoder alone, by the other one."""


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
    cache: EmbeddingCache | None = None
    """Embeddings on disk; None: none are kept."""
    build_objectives: Callable[[], Mapping[str, Objective]] = dict
    """Function that returns `objectives`; the default is that of a model without any."""
    shown: Shown = field(default_factory=Shown)
    _embedded: dict[str, Embedded] = field(default_factory=dict)

    def of(self, task: Task, check_stop: CheckStop) -> "Context":
        """Return a context for the current weights of a task, without embeddings or pictures."""
        return replace(
            self,
            model=task.model,
            logit_scale=task.logit_scale,
            build_objectives=lambda: task.objectives,
            check_stop=check_stop,
            shown=Shown(),
            _embedded={},
        )

    @property
    def objectives(self) -> Mapping[str, Objective]:
        """Objectives that the model was trained with, by name; those of a checkpoint are built on first use.

        Raises: ValueError if an objective of a checkpoint cannot be built.
        """
        return self.build_objectives()

    @property
    def captioned_sets(self) -> list[str]:
        """Names of the data sets with captions."""
        return [name for name, data in self.sets.items() if data.caption is not None]

    @property
    def text_sets(self) -> list[str]:
        """Names of the data sets with captions and without images; with a text encoder alone, all with captions."""
        return [name for name in self.captioned_sets if name not in self.image_sets]

    @property
    def pair_sets(self) -> list[str]:
        """Names of the data sets with images and captions."""
        return [name for name in self.captioned_sets if name in self.image_sets]

    @property
    def image_sets(self) -> list[str]:
        """Names of the data sets with images."""
        return [name for name, data in self.sets.items() if data.preprocess is not None]

    @property
    def labelled_sets(self) -> list[str]:
        """Names of the data sets with images and labels."""
        return [name for name in self.image_sets if self.sets[name].label is not None]

    @property
    def classified_sets(self) -> list[str]:
        """Names of the data sets with images, labels and classes."""
        return [name for name in self.labelled_sets if self.sets[name].classes is not None]

    def sets_with(self, *fields: str) -> list[str]:
        """Return the names of the data sets with images and all of these further fields."""
        return [name for name in self.image_sets if set(fields) <= self.sets[name].fields.keys()]

    @property
    def trainable_sets(self) -> list[str]:
        """Names of the data sets with images, labels and a training split."""
        return [name for name in self.labelled_sets if self.sets[name].train is not None]

    @property
    def trainable_text_sets(self) -> list[str]:
        """Names of the data sets with captions, labels and a training split, and without images."""
        labelled = [name for name in self.text_sets if self.sets[name].label is not None]
        return [name for name in labelled if self.sets[name].train is not None]

    def embedded(self, name: str) -> Embedded:
        """Return the embeddings of the data set `name`. The first call is a collective."""
        if name not in self._embedded:
            self._embedded[name] = self._embed(self.sets[name])
        return self._embedded[name]

    def embedded_train(self, name: str) -> Embedded:
        """Return the embeddings of the training split of the data set `name`. The first call is a collective."""
        split = f"{name}.train"
        if split not in self._embedded:
            data = self.sets[name]
            assert data.train is not None
            caption = data.caption if name in self.text_sets else None
            self._embedded[split] = self._embed(
                replace(data, name=split, shards=data.train, caption=caption, train=None, fields={})
            )
        return self._embedded[split]

    def embedded_train_pairs(self, name: str, max_samples: int) -> Embedded:
        """Return the embeddings of images and captions of the training split of the data set `name`.

        Args:
            name: name of the data set, which has a training split and captions.
            max_samples: largest number of samples, spread evenly over the split.

        The first call is a collective.
        """
        split = f"{name}.train of {max_samples} pairs"
        if split not in self._embedded:
            data = self.sets[name]
            assert data.train is not None
            rows = evenly_spread(max_samples, data.train.num_samples)
            chosen = selected(data.train, np.array(rows, np.int64))
            self._embedded[split] = self._embed(
                replace(data, name=f"{name}.train", shards=chosen, train=None, fields={})
            )
        return self._embedded[split]

    def _embed(self, data: EvalSet) -> Embedded:
        def compute() -> Embedded:
            with self.autocast:
                return embed(
                    self.model,
                    self.tokenizer,
                    data,
                    self.batch_size,
                    self.workers,
                    self.timeout_seconds,
                    self.check_stop,
                )

        if self.cache is None:
            return compute()
        return self.cache.embedded(data, self.batch_size, self.model.device, compute)

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
    """Protocol of an evaluator, which is called on every rank.

    An evaluator may also have `towers`, the encoders that it needs: `("image", "text")` (the default), `("image",)` or
    `("text",)`. A model without one of them is refused. Its attribute `needs` tells what `data.val.<name>` must have, such as
    "label and classes".
    """

    data: Sequence[str] | None = None
    """Names of the data sets in `data.val` to use; None uses all applicable ones."""

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the names of the data sets in `context.sets` that have the fields that this evaluator needs."""
        ...

    def __call__(self, name: str, context: Context) -> Mapping[str, float | Score]:
        """Return the scores on the data set `name`, by metric, which are the same on every rank. A collective.

        A `Score` is a number with confidence intervals.
        """
        ...


@torch.no_grad()
def evaluate(evaluators: Mapping[str, Evaluator], context: Context) -> dict[str, Score]:
    """Run evaluators on their data sets. A collective.

    Returns: scores by `eval-<data set>/<metric>`.
    Raises: ValueError if an evaluator names a data set that is not applicable; UsageError if its scores are no numbers.
    """
    scores: dict[str, Score] = {}
    with in_evaluation_mode(context.model):
        for name, evaluator in evaluators.items():
            for data in chosen_sets(name, evaluator, context):
                context.check_stop()
                found = _scores(evaluator(data, context), name)
                scores |= {f"eval-{data}/{metric}": score for metric, score in found.items()}
    return scores


def _scores(scores: object, name: str) -> dict[str, Score]:
    """Return an evaluator's scores; numbers, and arrays and tensors of one number, become scores without intervals."""
    if isinstance(scores, Mapping):
        try:
            return {
                str(metric): value if isinstance(value, Score) else Score(float(value))
                for metric, value in scores.items()
            }
        except (TypeError, ValueError, RuntimeError):
            pass
    raise UsageError(f"eval.{name} returned {str(scores)[:200]}; expected a dictionary with a number for each metric")


class Evaluation:
    """Evaluations of a run with the interval of each.

    Args:
        evaluators: evaluators by name.
        every: interval of each evaluator, by the same names.
        clock: clock of the run.
        context: input of the evaluators; `run` replaces its model.

    Raises: ValueError if an evaluator cannot be run on the model or its data sets.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator],
        every: Mapping[str, Duration],
        clock: Clock,
        context: Context,
    ) -> None:
        self._evaluators, self._every, self._clock, self._context = evaluators, every, clock, context
        self._untried = set(evaluators)
        chosen = {name: chosen_sets(name, evaluator, context) for name, evaluator in evaluators.items()}
        self._evaluated = sorted({data for sets in chosen.values() for data in sets})
        self.without_data = needs_text({name: evaluators[name] for name, sets in chosen.items() if not sets})
        """Evaluators that find no data set with what they need, with that; empty if there are none."""

    def check_best(self, best: str, has_average: bool) -> None:
        """Check that the metric of `checkpoint.best` is of a data set that is evaluated.

        Args:
            best: `eval-<data set>/<name>`, or `eval-<data set>-ema/<name>` for the averaged weights.
            has_average: True if the run averages its weights.

        Raises: ValueError.
        """
        prefix = best.partition("/")[0]
        if prefix in {f"eval-{name}" for name in self._evaluated}:
            return
        if prefix not in {f"eval-{name}-ema" for name in self._evaluated}:
            raise ValueError(
                f"checkpoint.best is {best!r}; expected eval-<data set>/<metric> of a data set that is evaluated: "
                f"{', '.join(self._evaluated) or 'there is none'}"
            )
        if not has_average:
            raise ValueError(
                f"checkpoint.best is {best!r}, but the run averages no weights; expected {best.replace('-ema/', '/', 1)!r}, "
                "or an average: trainer.ema_decay=0.999"
            )

    @property
    def has_run_all(self) -> bool:
        """True once every evaluator has run in this process."""
        return not self._untried

    def is_due(self, samples: int) -> bool:
        """Return True if an evaluator is due after the step that ends at `samples` samples. All are due at the run's end."""
        return bool(self._due(samples))

    def run(
        self, task: Task, samples: int, writer: RunWriter | None, check_stop: CheckStop = go_on
    ) -> dict[str, Score]:
        """Run the evaluators that are due after the step that ends at `samples` samples. A collective.

        Args:
            task: unsharded task to evaluate.
            samples: number of samples seen.
            writer: writes the evaluators' pictures; None drops them.
            check_stop: function called before each batch, equally often on all ranks.

        Returns: scores by `eval-<data set>/<metric>`.
        Raises: any exception of `check_stop`.
        """
        due = self._due(samples)
        context = self._context.of(task, check_stop)
        scores = evaluate(due, context)
        self._untried -= due.keys()
        if writer is not None:
            for name, picture in context.shown.pictures.items():
                writer.image(name, samples, picture)
            for name, projection in context.shown.projections.items():
                writer.embeddings(name, samples, *projection)
        return scores

    def _due(self, samples: int) -> dict[str, Evaluator]:
        is_last, before = samples == self._clock.total_samples, samples - self._clock.batch_size
        return {
            name: evaluator
            for name, evaluator in self._evaluators.items()
            if is_last or self._clock.is_due(self._every[name], before, samples)
        }


def evenly_spread(count: int | None, total: int) -> list[int]:
    """Return `count` of `total` indices, spread evenly from the first to the last; all if it is None or there are fewer."""
    number = total if count is None else min(count, total)
    return torch.linspace(0, total - 1, number, dtype=torch.float64).round().long().tolist()


def check_evaluator(evaluator: object, name: str) -> None:
    """Raises: ValueError if the evaluator `name` lacks a method, or has a public name that resembles one of the protocol."""
    kind = type(evaluator).__name__
    members = ("applicable_datasets", "data", "needs", "towers")
    if (wrong := misspelt(type(evaluator), members)) is not None:
        raise ValueError(f"eval.{name}: {kind}.{wrong[0]} is no member of an evaluator; did you mean {wrong[1]}?")
    for method, call in (("__call__", "(name, context)"), ("applicable_datasets", "(context)")):
        if not callable(getattr(evaluator, method, None)):
            raise ValueError(f"eval.{name}: {kind} has no method {method}{call}; expected one")


def needs_text(evaluators: Mapping[str, Evaluator]) -> str:
    """Return the names of evaluators with what each needs in `data.val.<name>`."""
    return "; ".join(f"{name} needs {_needs(evaluator)}" for name, evaluator in evaluators.items())


def _needs(evaluator: Evaluator) -> str:
    return str(getattr(evaluator, "needs", "what its applicable_datasets asks for"))


def lacking_tower(evaluator: Evaluator, model: ImageTextModel) -> str | None:
    """Return the encoder that an evaluator needs and a model lacks, `image` or `text`; None if there is none."""
    return next((tower for tower in getattr(evaluator, "towers", _TOWERS) if getattr(model, tower, 0) is None), None)


def chosen_sets(name: str, evaluator: Evaluator, context: Context) -> list[str]:
    """Return the data sets of the evaluator `name`.

    Raises: ValueError if its `data` names a data set that is not applicable, or if the model lacks an encoder.
    """
    towers = getattr(evaluator, "towers", _TOWERS)
    if isinstance(towers, str) or not set(towers) <= set(_TOWERS):
        raise ValueError(f"eval.{name} has towers = {towers!r}; expected a tuple of 'image', 'text' or both")
    if (tower := lacking_tower(evaluator, context.model)) is not None:
        needed = " and ".join(f"{each}s" for each in towers)
        others = _WITHOUT[tower]
        raise ValueError(
            f"eval.{name} embeds {needed}, but model.{tower} is null; expected evaluators that do without, such as "
            f"eval=[{others}], or none: eval=[]"
        )
    possible = evaluator.applicable_datasets(context)
    if unknown := [data for data in possible if data not in context.sets]:
        known = ", ".join(context.sets) or "none"
        raise ValueError(f"eval.{name}: applicable_datasets returned {unknown}; expected some of data.val: {known}")
    named = getattr(evaluator, "data", None)
    if named is None:
        return possible
    for data in named:
        if data not in possible:
            known = ", ".join(possible) or "there is none"
            lack = f"lacks what it needs ({_needs(evaluator)})" if data in context.sets else "is not in data.val"
            raise ValueError(f"eval.{name}.data has {data!r}, which {lack}; expected one of: {known}")
    return list(named)
