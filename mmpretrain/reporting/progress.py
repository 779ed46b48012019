"""Progress of a run on the console, and the table of its results."""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmpretrain.errors import printable
from mmpretrain.scores import Interval

log = logging.getLogger(__name__)


_HUGE = 1e12  # from there on numbers are shown by their power of ten
_FILE_WIDTH = 120  # of a table that is written to a file


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


Intervals = Mapping[str, Mapping[str, Interval]]
"""95 % confidence intervals by metric and by the unit that is resampled, as `records.read_intervals` returns them."""


def table_of(results: Mapping[str, float | None], intervals: Intervals) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the rows of a table of results, with a column for each kind of confidence interval.

    Numbers have four decimals, or three significant digits where those would all be zeros.
    """
    units = dict.fromkeys(unit for name in results for unit in intervals.get(name, {}))
    rows = []
    for name, value in results.items():
        text = "-" if value is None else _number(value, "," if isinstance(value, int) else ",.4f")
        bounds = [intervals.get(name, {}).get(unit) for unit in units]
        ranges = ["" if each is None else "–".join(_number(bound, ".3f") for bound in each) for each in bounds]
        rows.append([name, text, *ranges])
    return ["metric", "value", *(f"95% by {unit}" for unit in units)], rows


def _number(value: float, form: str) -> str:
    if form == ",.4f" and 0 < abs(value) < 5e-5:
        form = ".3g"
    return format(value, form if abs(value) < _HUGE else ".4g")


def print_results(results: Mapping[str, float | None], folder: Path, intervals: Intervals) -> None:
    """Print the table of results and the locations of checkpoints, report and curves."""
    columns, rows = table_of(results, intervals)
    table = Table(title=printable(str(folder)), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    console = Console(markup=False, emoji=False, width=width)  # names may contain rich's markup characters
    console.print(table)
    if (folder / "checkpoints").is_dir():
        console.print(f"checkpoints: {folder / 'checkpoints'}", soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(f"report:      {folder / 'report.html'}", soft_wrap=True)
    if (folder / "tensorboard").is_dir():
        console.print(f"curves:      tensorboard --logdir {folder}", soft_wrap=True)
