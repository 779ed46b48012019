"""Metrics of a run: metrics.jsonl, TensorBoard, progress bar and pictures. Only rank 0 writes."""

import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mmpretrain import files
from mmpretrain.batch import Batch
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import printable
from mmpretrain.objectives.base import Example
from mmpretrain.reporting.pictures import example_page, pair_grid

log = logging.getLogger(__name__)

HParam = str | float | bool
_MAX_RECORDS_BYTES = 2 << 30  # about ten million refused samples
_EVENTS = "events.out.tfevents."
_LARGEST = sys.float_info.max

# By default TensorBoard's table shows five settings: those marked as different, in the order of their names.
_FIRST_SETTINGS = ("batch_size", "lr", "model", "objective", "seed")


def is_lower_better(metric: str) -> bool:
    """Return True for metrics that improve when they fall: names that end with `loss`, `perplexity` or `seconds`."""
    return metric.endswith(("loss", "perplexity", "seconds"))


def is_better(metric: str, score: float, best: float | None) -> bool:
    """Return True if `score` improves on `best` (see `is_lower_better`); NaN and infinity never do."""
    sign = -1 if is_lower_better(metric) else 1
    return math.isfinite(score) and (best is None or sign * score > sign * best)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one per line. An invalid last line is ignored, since a kill may have cut it short.

    Returns: the objects; an empty list if the file does not exist.
    Raises: ValueError if another line is not a JSON object, or if the path is not a regular file or is too large.
    """
    if not path.exists():
        return []
    lines = files.read_bytes(path, _MAX_RECORDS_BYTES).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = files.parse_json(line, where)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{where}: not JSON; expected one object a line, remove it") from None
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}; expected one object a line, remove it")
        records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Read a metrics.jsonl. Raises: ValueError for an invalid file (see `read_records`) or value."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        where = f"{path}, line {number}"
        _check_numbers(record, where)
        for key in ("step", "samples"):
            if not isinstance(record.get(key), int):
                raise ValueError(f"{where}: {key} is {record.get(key)!r}; expected an integer, remove the line")
    return records


def read_results(path: Path) -> dict[str, float | None]:
    """Read a results.json. Raises: ValueError if a value is not a number or null."""
    results = files.read_json(path)
    _check_numbers(results, str(path))
    return results


def read_refused(path: Path) -> list[dict[str, str]]:
    """Read a quarantine.jsonl. Raises: ValueError if a record lacks its shard, key or reason."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        for key in ("shard", "key", "reason"):
            if not isinstance(record.get(key), str):
                raise ValueError(
                    f"{path}, line {number}: {key} is {record.get(key)!r}; expected a text, remove the line"
                )
    return records


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not (is_number or value is None):
            shown = str(value)[:40] if isinstance(value, float | str) else type(value).__name__
            raise ValueError(f"{where}: {name!r} is {shown}; expected a number or null, as the run wrote it")


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace non-finite values by None, since JSON cannot represent them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class MetricsWriter:
    """Write scalars to metrics.jsonl and TensorBoard, with samples seen as the x axis.

    Args:
        folder: the run's directory.
        step, samples: position that the run resumes from. Later records of an earlier process are dropped, so that no step
            appears twice.
    """

    def __init__(self, folder: Path, step: int = 0, samples: int = 0) -> None:
        self._folder = folder
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= step]  # type: ignore[operator]
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path, self._file = path, path.open("ab", buffering=0)
        purge = samples + 1 if step else 0
        before = set((folder / "tensorboard").glob(f"{_EVENTS}*"))
        self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=purge)
        (begun,) = set((folder / "tensorboard").glob(f"{_EVENTS}*")) - before
        file_writer = self._tensorboard._get_file_writer()
        file_writer.event_writer.close()
        file_writer.event_writer = _EventFile(begun, before)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Log values of a step. Non-finite values are written to metrics.jsonl as null."""
        with files.naming(self._path):
            files.write_all(self._file, json.dumps({"step": step, "samples": samples, **finite(values)}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, samples)

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

    def image(self, name: str, samples: int, image: np.ndarray) -> None:
        """Log a picture, uint8 [h, w, 3]. Its latest version is also written to `pictures/`."""
        self._tensorboard.add_image(name, image, samples, dataformats="HWC")
        path = self._folder / "pictures" / f"{name.replace('/', '.')}.png"
        path.parent.mkdir(exist_ok=True)
        with files.naming(path):
            Image.fromarray(image).save(path)

    def examples(self, name: str, samples: int, examples: Sequence[Example]) -> None:
        """Log an objective's examples: all pictures on one page, and all texts as one text."""
        if examples and examples[0].images:
            self.image(name, samples, example_page(examples))
        if any(example.text for example in examples):
            # Indent by four spaces, so that Markdown shows each text unchanged.
            lines = [line for example in examples for line in (*example.text.splitlines(), "")]
            self._tensorboard.add_text(name, "\n".join(f"    {line}" for line in lines), samples)

    def embeddings(self, name: str, samples: int, rows: np.ndarray, labels: Sequence[str], images: Tensor) -> None:
        """Log rows [n, e] for TensorBoard's projector, each with a label and a thumbnail uint8 [n, 3, h, w]."""
        self._tensorboard.add_embedding(rows, list(labels), images.float() / 255, samples, tag=name)

    def hparams(self, settings: Mapping[str, HParam], metrics: Sequence[str]) -> None:
        """Add the run to TensorBoard's table of runs with its settings and the last values of `metrics`."""
        experiment, start, end = hparams(dict(settings), dict.fromkeys(metrics, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in _FIRST_SETTINGS
        plugin.content = content.SerializeToString()
        for summary in (experiment, start, end):
            self._tensorboard._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Close metrics.jsonl and the TensorBoard writer."""
        self._file.close()
        self._tensorboard.close()


class _EventFile:
    """TensorBoard event file, written immediately in the calling thread.

    It replaces torch's writer for two reasons. That one writes in a separate thread, in which a full disk only prints a
    traceback. And TensorBoard reads event files in the order of the timestamps in their names: if the clock was set back
    before a run is resumed, the new file would be read before the earlier ones, and the purge step in their first event
    would drop its data. The new file is therefore renamed to have the latest timestamp.

    Args:
        begun: file that torch created and closed.
        others: event files of earlier processes.
    """

    def __init__(self, begun: Path, others: Iterable[Path]) -> None:
        self._folder = begun.parent
        seconds = [int(match[1]) for path in others if (match := re.match(rf"{_EVENTS}(\d{{1,18}})\.", path.name))]
        own, _, rest = begun.name.removeprefix(_EVENTS).partition(".")
        later = max([int(own), *(second + 1 for second in seconds)])
        self._path = begun.rename(begun.with_name(f"{_EVENTS}{later:010d}.{rest}"))
        self._file = self._path.open("ab", buffering=0)

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Append one event. Raises: OSError that names the file."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with files.naming(self._path):
            files.write_all(self._file, record.getvalue())

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class ProgressBar:
    """Progress with loss, pairs per second and time left: a bar on a terminal, else one line per logged step."""

    def __init__(self, num_steps: int, step: int, enabled: bool) -> None:
        self._num_steps = num_steps
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} pairs/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=step, loss=math.nan, speed=math.nan)

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Update the position of the bar after a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, speed: float, seconds_left: float) -> None:
        """Show the values of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, loss=loss, speed=speed)
        elif self._enabled:
            minutes, seconds = divmod(round(seconds_left), 60)
            log.info(
                "step %d/%d  loss %.4f  %.0f pairs/s  %d:%02d left",
                step,
                self._num_steps,
                loss,
                speed,
                minutes,
                seconds,
            )


def print_results(results: Mapping[str, float | None], folder: Path) -> None:
    """Print the table of results and the locations of checkpoints and curves."""
    table = Table(title=printable(str(folder)), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if value is None:
            shown = "-"
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(printable(name), shown)
    console = Console(markup=False, emoji=False)  # names may contain rich's markup characters
    console.print(table)
    console.print(f"checkpoints: {folder / 'checkpoints'}", soft_wrap=True)
    console.print(f"curves:      tensorboard --logdir {folder}", soft_wrap=True)
