"""Zero-shot classification: predict the class whose text embeddings are most similar to the image."""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.config.instantiate import accepts
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.evals.embeddings import Classes
from mmpretrain.reporting import pictures
from mmpretrain.scores import Score

_TEMPLATE_SETS = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
}


def read_classes(
    path: Path, class_column: str = "label", text_column: str | None = None, templates: str | Sequence[str] = "openai"
) -> Classes:
    """Read the classes of a file: a TSV with a header, or one name per line.

    Args:
        path: path of the file; the order of its lines is the order of the labels.
        class_column: column of the TSV with the class names.
        text_column: column of the TSV with a text for each class, which is used without templates.
        templates: `openai` or `simple` (sets of open_clip), or sentences with `{}` as placeholder of the class name.

    Raises: ValueError for a missing file, column or value, an empty file, or unknown templates.
    """
    if not path.is_file():
        raise ValueError(f"classes is {str(path)!r}, which is no file; expected a TSV with a header or one name a line")
    lines = path.read_text(encoding="utf-8").splitlines()
    own_texts: list[str] = []
    if lines and "\t" in lines[0]:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        for column in (class_column, *([text_column] if text_column else [])):
            if rows and column not in rows[0]:
                raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(rows[0])}")
            if empty := next((row for row in rows if not (row[column] or "").strip()), None):
                whose = repr(empty[class_column]) if empty[class_column] else "a class"
                raise ValueError(f"{path}: {whose} has no {column!r}; expected a value in each line")
        names = [row[class_column] for row in rows]
        own_texts = [row[text_column] for row in rows] if text_column else []
    else:
        if text_column:
            raise ValueError(f"text_column is {text_column!r}, but {path} has no columns; expected a TSV with a header")
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} names no class; expected at least one")
    if own_texts:
        return Classes(names, [[text] for text in own_texts])
    return prompted(names, templates)


def prompted(names: Sequence[str], templates: str | Sequence[str]) -> Classes:
    """Return the classes of these names, with a text of each template; `templates` and errors as in `read_classes`."""
    fills = _templates(templates)
    return Classes(names, [[fill(name) for fill in fills] for name in names])


def _templates(templates: str | Sequence[str]) -> list[Callable[[str], str]]:
    if isinstance(templates, str):
        if templates not in _TEMPLATE_SETS:
            known = ", ".join(_TEMPLATE_SETS)
            raise ValueError(
                f"templates is {templates!r}; expected {known}, or a list of sentences with {{}} for the name"
            )
        return list(_TEMPLATE_SETS[templates])
    if not accepts(templates, Sequence[str]) or not templates or any("{}" not in t for t in templates):
        raise ValueError(f"templates is {templates!r}; expected sentences, each with {{}} where the class's name goes")
    return [partial(template.replace, "{}") for template in templates]


def class_embeddings(classes: Classes, context: Context) -> Tensor:
    """Return the mean of each class's text embeddings at unit length, float32 [C, e]. A collective."""
    rows = context.embedded_texts([text for group in classes.texts for text in group])
    groups = rows.split([len(group) for group in classes.texts])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


class ZeroShot:
    """Classify images by the mean of each class's text embeddings.

    Args:
        data: names of `data.val` to use; None uses each data set with `classes` and `label`.
        chunk_size: number of images classified at once; memory is proportional to chunk_size x number of classes. The
            ranks share the chunks.

    Raises: UsageError if `chunk_size` is below 1.
    """

    def __init__(self, data: Sequence[str] | None = None, chunk_size: int = 256) -> None:
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with classes and labels."""
        return context.classified_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `acc1`, `acc5` and `mean_per_class_recall`, and show the picture `confusion`."""
        classes = context.sets[name].classes
        assert classes is not None
        embedded = context.embedded(name)
        weights = class_embeddings(classes, context)
        predicted, ranks = self._classify(embedded.images, embedded.labels, weights)
        if distributed.is_main():
            counts, shown = _confusion(predicted, embedded.labels)
            picture = pictures.confusion(counts.cpu().numpy(), [classes.names[i] for i in shown], shown)
            context.show(name, "confusion", picture)
        return class_scores(ranks, embedded.labels)

    def _classify(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted class of each image and the rank of its right class, int64 [n] each. A collective.

        A chunk has the same images on any number of ranks, so that its similarities are the same bit for bit.
        """
        starts = range(0, len(images), self.chunk_size)
        results = [torch.zeros(0, 2, dtype=torch.int64, device=images.device)]
        for start in starts[distributed.share(len(starts))]:
            similarities = images[start : start + self.chunk_size] @ weights.T
            ranks = right_class_ranks(similarities, labels[start : start + self.chunk_size])
            results.append(torch.stack([similarities.argmax(dim=1), ranks], dim=1))
        predicted, all_ranks = distributed.gather_ragged_rows(torch.cat(results)).unbind(1)
        return predicted, all_ranks


def _confusion(predicted: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    """Count the true classes (rows) and predictions (columns) of the K classes that occur as either.

    Args:
        predicted, labels: predicted and true classes, int64 [n].

    Returns: (counts int64 [K, K], numbers of the K classes in ascending order).
    """
    shown, places = torch.cat([labels, predicted]).unique(return_inverse=True)
    rows, columns = places.chunk(2)
    counts = torch.bincount(rows * len(shown) + columns, minlength=len(shown) ** 2)
    return counts.reshape(len(shown), len(shown)), shown.tolist()
