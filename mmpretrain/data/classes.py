"""Classes of labelled data: their list, the texts that describe each of them, and the class of a sample."""

import csv
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import open_clip

from mmpretrain import files
from mmpretrain.data.clip_prompts import PREFIX, clip_prompts
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_label
from mmpretrain.data.source import SampleSource

log = logging.getLogger(__name__)

_MAX_LABEL = 10_000_000  # without a class list; memory of some evaluators is proportional to it

_TEMPLATE_SETS = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
}


@dataclass(frozen=True)
class Classes:
    """Classes of a data set: their names, and the texts that describe each of them."""

    names: Sequence[str]
    texts: Sequence[Sequence[str]]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Index of the first class of each name."""
        return {name: i for i, name in reversed(list(enumerate(self.names)))}


def first_other(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str]:
    """Return the first number of a class whose name differs in two lists, and both names as text; `none` behind an end."""
    number = next((i for i, (a, b) in enumerate(zip(names, others)) if a != b), min(len(names), len(others)))
    of_first, of_second = (repr(each[number]) if number < len(each) else "none" for each in (names, others))
    return number, of_first, of_second


def read_classes(
    path: Path | str,
    class_column: str = "label",
    text_column: str | None = None,
    templates: str | Sequence[str] = "openai",
) -> Classes:
    """Read the classes of a file: a TSV with a header, or one name per line; or those of a data set of CLIP's paper.

    Args:
        path: path of the file, whose lines are in the order of the labels; or `clip:NAME` (see `clip_prompts`).
        class_column: column of the TSV with the class names.
        text_column: column of the TSV with a text for each class, which is used without templates.
        templates: `openai` or `simple` (sets of open_clip), `clip:NAME`, or sentences with `{}` as placeholder of the name.

    Raises: ValueError for a missing file, column or value, an empty file, or an unknown data set or unknown templates.
    """
    if str(path).startswith(PREFIX):
        if text_column:
            raise ValueError(f"text_column is {text_column!r}, but {path} has no columns; expected null")
        names_of = clip_prompts(str(path), "classes").names
        texts = [[text for of_name in classes_named(names, templates).texts for text in of_name] for names in names_of]
        return Classes([names[0] for names in names_of], texts)
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"classes is {str(path)!r}, which is no file; expected a TSV with a header or one name a line")
    lines = files.read_text(path, files.MAX_LIST_BYTES).splitlines()
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
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        log.warning(
            "%s: %d names stand in it more than once, such as %r; a label's name means the first of them, and zero-shot "
            "classification cannot tell them apart", path, len(repeated), repeated[0],
        )  # fmt: skip
    if own_texts:
        return Classes(names, [[text] for text in own_texts])
    return classes_named(names, templates)


def classes_named(names: Sequence[str], templates: str | Sequence[str]) -> Classes:
    """Return classes with a text of each template, as `read_classes` does. Raises: ValueError for unknown templates."""
    fills = _templates(templates)
    return Classes(names, [[fill(name) for fill in fills] for name in names])


def _templates(templates: str | Sequence[str]) -> list[Callable[[str], str]]:
    if isinstance(templates, str) and templates.startswith(PREFIX):
        templates = clip_prompts(templates, "templates").templates
    if isinstance(templates, str):
        if templates not in _TEMPLATE_SETS:
            known = ", ".join([*_TEMPLATE_SETS, f"{PREFIX}NAME"])
            raise ValueError(
                f"templates is {templates!r}; expected {known}, or a list of sentences with {{}} for the name"
            )
        return list(_TEMPLATE_SETS[templates])
    if not isinstance(templates, Sequence) or not templates or any("{}" not in str(t) for t in templates):
        raise ValueError(f"templates is {templates!r}; expected sentences, each with {{}} where the class's name goes")
    return [partial(template.replace, "{}") for template in templates]


def read_class(source: SampleSource, sample: int, field: str, classes: Classes | None) -> int:
    """Return the class of a sample.

    Args:
        source: the samples.
        sample: number of the sample.
        field: `cls` (an integer) or `json.<path>` (an integer or a class's name).
        classes: the classes; None if they are not known, where labels are integers.

    Raises: BadSample if the sample has no label, or it is none of the classes.
    """
    value = read_label(source.read(sample, (field.split(".")[0],)), field)
    # `cls` is always an index, even if the names of classes are numbers.
    if field != "cls" and classes is not None and value in classes.numbers:
        return classes.numbers[value]
    try:
        label = int(value)
    except ValueError:
        raise BadSample(f"its label {value!r} is neither an integer nor the name of a class", "label") from None
    if not 0 <= label <= _MAX_LABEL:
        raise BadSample(f"its label is {value[:40]}; expected the number of a class, from 0 to {_MAX_LABEL}", "label")
    if classes is not None and label >= len(classes.names):
        raise BadSample(f"its label {label} is none of the {len(classes.names)} classes", "label")
    return label
