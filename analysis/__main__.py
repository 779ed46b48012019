"""The command line: `python -m analysis COMMAND`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from analysis.compare import draw_curves, table
from analysis.runs import find_runs
from data_tools.command_line import run_app
from mmpretrain.errors import printable

app = typer.Typer(
    help="From finished runs to tables and pictures.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_UNBOUNDED = 10_000
_SETTING_WIDTH, _METRIC_WIDTH = 40, 20


@app.callback()
def _analysis() -> None:
    """From finished runs to tables and pictures."""


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories, or folders that hold some.")],
    metric: Annotated[str | None, typer.Option(help="What ranks; default: the first evaluation's first score.")] = None,
    curves: Annotated[Path | None, typer.Option(help="A .png for the curves over samples and over wall time.")] = None,
) -> None:
    """Settings beside each other: mean ± deviation over seeds, the best first.

    Example: python -m analysis compare runs/emoji_clip --metric eval-val/image_retrieval_recall@5 --curves curves.png
    """
    found = find_runs(runs)
    ranking, metrics, rows = table(found, metric)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED  # a file or a pipe holds every column
    fitting = max(1, (console.width - _SETTING_WIDTH) // _METRIC_WIDTH)
    shown = Table(title=f"{len(found)} runs, best {printable(ranking)} first", title_justify="left")
    shown.add_column("setting", overflow="fold")
    shown.add_column("seeds", justify="right")
    for name in metrics[:fitting]:
        shown.add_column(printable(name).replace("/", "/\n"), justify="right", no_wrap=True)
    for row in rows:
        seeds = f"{row.num_seeds}" + (f" (+{row.num_unfinished} unfinished)" if row.num_unfinished else "")
        shown.add_row(printable(row.name), seeds, *(row.cell(name) for name in metrics[:fitting]))
    console.print(shown)
    if metrics[fitting:]:
        console.print(f"not shown for want of width: {printable(', '.join(metrics[fitting:]))}", soft_wrap=True)
    if curves is not None:
        draw_curves(found, [ranking, "train/loss"], curves)
        console.print(f"curves: {curves}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; wrong use is answered in one line and with exit code 2."""
    return run_app(app, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
