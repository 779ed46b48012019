"""Metrics and pictures of a run. Only rank 0 writes.

`RunWriter` writes metrics.jsonl and pictures/, which are part of the run, and passes everything on to the metric writers that
`writer` in the configuration names. A class is a metric writer if it has the methods of `MetricWriter`.

The first arguments of a writer's `__init__` may be `folder` (the run's directory), `step` and `samples` (the position that
the run starts or resumes from); it receives those of them that it names. The others are the arguments of its YAML. The
x axis of a writer is the number of samples seen, so that runs with different batch sizes can be compared.

A writer's `__init__` raises ValueError for invalid arguments, which ends the command with a message of one line. So does a
package that cannot be imported. A full disk ends the run, as it does everywhere. After any other exception, such as one of
a service that cannot be reached, the writer is left out until the run is started again, with one warning. Nothing is lost:
metrics.jsonl has every record, and a writer that is opened again receives the records after `logged`.
"""

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmpretrain import files
from mmpretrain.batch import Batch
from mmpretrain.config import instantiate
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import NO_SPACE, UsageError, misspelt
from mmpretrain.objectives.base import Example
from mmpretrain.reporting.pictures import example_page, pair_grid
from mmpretrain.reporting.records import finite, read_metrics

log = logging.getLogger(__name__)

Setting = str | float | bool
"""Value of one of the run's main settings."""

_LONGEST_REASON = 300


def _nothing(*arguments: Any) -> None: ...


@dataclass(frozen=True)
class MetricWriter:
    """Methods and attributes of a metric writer. All but `scalars` are optional and have the defaults below."""

    scalars: Callable[[int, int, Mapping[str, float]], None]
    """`scalars(step, samples, values)` writes the values of a step, each step once. Values may be NaN or infinite."""
    logged: int | None = None
    """Number of samples at the last record that the writer already holds when it is built. Earlier steps are not written
    again, and later records of the run are written at once; 0: all of them. None: all records up to `samples` count as
    written."""
    settings: Callable[[Mapping[str, Setting]], None] = _nothing
    """`settings(values)` writes the run's main settings. Called whenever the run is started."""
    image: Callable[[str, int, np.ndarray], None] = _nothing
    """`image(name, samples, pixels)` writes a picture, uint8 [h, w, 3]."""
    text: Callable[[str, int, str], None] = _nothing
    """`text(name, samples, text)` writes a text of several lines."""
    embeddings: Callable[[str, int, np.ndarray, Sequence[str], Tensor], None] = _nothing
    """`embeddings(name, samples, rows, labels, images)` writes rows [n, e], each with a label and a thumbnail, uint8
    [n, 3, h, w]."""
    hparams: Callable[[Mapping[str, Setting], Sequence[str]], None] = _nothing
    """`hparams(settings, metrics)` writes the run's main settings with the last values of `metrics`. Called at the end."""
    close: Callable[[], None] = _nothing
    """`close()` is called when the process ends, except when it is killed."""


_METHODS = tuple(method.name for method in fields(MetricWriter))


def check_writers(nodes: Mapping[str, Any]) -> None:
    """Check the methods of the metric writers' classes.

    Args:
        nodes: configuration of the writers by name, whose arguments `mmpretrain.config.resolve` has checked.

    Raises: UsageError for a class without `scalars`, and for a public method whose name resembles one of `MetricWriter`.
    """
    for name, node in nodes.items():
        kind = instantiate.find(node["_target_"])
        if not isinstance(kind, type):
            continue
        if (wrong := misspelt(kind, _METHODS)) is not None:
            raise UsageError(
                f"writer.{name}: {kind.__name__}.{wrong[0]} is no method of a metric writer and would never be called; "
                f"did you mean {wrong[1]}?"
            )
        if not hasattr(kind, "scalars"):
            raise UsageError(
                f"writer.{name}: {kind.__name__} has no method scalars(step, samples, values); expected one"
            )


def read_run_id(path: Path) -> str | None:
    """Return the id that `write_run_id` stored, or None if there is none. Raises: ValueError for another content."""
    if not path.exists():
        return None
    run_id = files.read_json(path).get("run_id")
    if not isinstance(run_id, str):
        raise ValueError(
            f"{path}: run_id is {run_id!r}; expected a text, remove the file to begin a new run of the service"
        )
    return run_id


def write_run_id(path: Path, run_id: str) -> None:
    """Store the id of the run of an online service, which a resumed run continues."""
    files.write_text(path, json.dumps({"run_id": run_id}) + "\n")


class RunWriter:
    """Write scalars to metrics.jsonl, pictures to pictures/, and both to the metric writers.

    Args:
        folder: the run's directory.
        step, samples: position that the run starts or resumes from. Later records of an earlier process are dropped, so that
            no step appears twice.
        nodes: checked configuration of the metric writers by name.

    Raises: ValueError if metrics.jsonl is invalid; UsageError if a writer refuses its arguments or lacks a package.
    """

    def __init__(self, folder: Path, step: int, samples: int, nodes: Mapping[str, Any]) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]  # type: ignore[operator]
        files.write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("ab", buffering=0)
        self._writers: dict[str, MetricWriter] = {}
        self._logged: dict[str, int] = {}
        for name, node in nodes.items():
            with self._left_out_if_it_fails(name):
                self._writers[name] = writer = _build(name, node, folder, step, samples)
                self._logged[name] = samples if writer.logged is None else writer.logged
                for record in kept:
                    values = {key: math.nan if value is None else value for key, value in record.items()}
                    self._write_scalars(name, int(values.pop("step")), int(values.pop("samples")), values)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Pass on the run's main settings."""
        self._call("settings", values)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Log values of a step. Non-finite values are written to metrics.jsonl as null."""
        with files.naming(self._path):
            files.write_all(self._file, json.dumps({"step": step, "samples": samples, **finite(values)}) + "\n")
        for name in list(self._writers):
            with self._left_out_if_it_fails(name):
                self._write_scalars(name, step, samples, values)

    def _write_scalars(self, name: str, step: int, samples: int, values: Mapping[str, float]) -> None:
        if samples > self._logged[name]:
            self._writers[name].scalars(step, samples, values)

    def pairs(self, batch: Batch, tokenizer: Tokenizer, count: int = 16) -> None:
        """Log some samples of each stream as the model sees them: a grid of images with captions, or texts."""
        for name, samples in batch.streams.items():
            # Rows are in shard order, so take them evenly from the whole micro-batch.
            rows = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int).tolist()
            captions = [""] * len(rows)
            if samples.text is not None and samples.lengths is not None:
                captions = [tokenizer.decode(samples.text[row, : samples.lengths[row]].tolist()) for row in rows]
            if samples.images is None:
                self.examples(f"train/{name}", 0, [Example([], caption) for caption in captions])
            else:
                self.image(f"train/{name}", 0, pair_grid(samples.images[rows], captions))

    def image(self, name: str, samples: int, pixels: np.ndarray) -> None:
        """Log a picture, uint8 [h, w, 3]. Its latest version is also written to `pictures/`."""
        self._call("image", name, samples, pixels)
        path = self._folder / "pictures" / f"{name.replace('/', '.')}.png"
        path.parent.mkdir(exist_ok=True)
        with files.naming(path):
            Image.fromarray(pixels).save(path)

    def examples(self, name: str, samples: int, examples: Sequence[Example]) -> None:
        """Log an objective's examples: all pictures on one page, and all texts as one text."""
        if examples and examples[0].images:
            self.image(name, samples, example_page(examples))
        if any(example.text for example in examples):
            lines = [line for example in examples for line in (*example.text.splitlines(), "")]
            self._call("text", name, samples, "\n".join(lines))

    def embeddings(self, name: str, samples: int, rows: np.ndarray, labels: Sequence[str], images: Tensor) -> None:
        """Log rows [n, e], each with a label and a thumbnail uint8 [n, 3, h, w]."""
        self._call("embeddings", name, samples, rows, labels, images)

    def hparams(self, settings: Mapping[str, Setting], metrics: Sequence[str]) -> None:
        """Log the run's main settings with the names of its metrics."""
        self._call("hparams", settings, metrics)

    def close(self) -> None:
        """Close metrics.jsonl and the writers."""
        self._file.close()
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        for name in list(self._writers):
            with self._left_out_if_it_fails(name):
                getattr(self._writers[name], method)(*arguments)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        """Remove the writer `name` with a warning after an exception, except UsageError and a full disk."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # training must not depend on an online service
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            self._writers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
            log.warning(
                "writer.%s failed (%s) and is left out until the run is started again; metrics.jsonl has every value",
                name,
                reason,
            )


def _build(name: str, node: instantiate.Node, folder: Path, step: int, samples: int) -> MetricWriter:
    """Build a metric writer. Raises: UsageError if it refuses its arguments or lacks a package."""
    named = inspect.signature(instantiate.find(node["_target_"])).parameters
    position = {"folder": folder, "step": step, "samples": samples}
    runtime = {key: value for key, value in position.items() if key in named}
    try:
        writer = instantiate.instantiate(node, 0, f"writer.{name}", **runtime)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"writer.{name} needs the package {error.name!r}, which is not installed; pip install {error.name}, or leave "
            f"{name} out of writer=[...]"
        ) from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    return MetricWriter(**{method: getattr(writer, method) for method in _METHODS if hasattr(writer, method)})
