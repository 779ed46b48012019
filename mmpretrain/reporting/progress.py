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

log = logging.getLogger(__name__)


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
    """Print the table of results and the locations of checkpoints, report and curves."""
    table = Table(title=printable(str(folder)), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(printable(name), shown)
    console = Console(markup=False, emoji=False)  # names may contain rich's markup characters
    console.print(table)
    console.print(f"checkpoints: {folder / 'checkpoints'}", soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(f"report:      {folder / 'report.html'}", soft_wrap=True)
    if (folder / "tensorboard").is_dir():
        console.print(f"curves:      tensorboard --logdir {folder}", soft_wrap=True)
