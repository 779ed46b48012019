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
    help="Make tables and plots of finished runs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_UNBOUNDED = 10_000
_SETTING_WIDTH, _METRIC_WIDTH = 40, 20


@app.callback()
def _analysis() -> None:
    """Make tables and plots of finished runs."""


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, or folders that contain them.")],
    metric: Annotated[str | None, typer.Option(help="Metric to sort by; default: the first score.")] = None,
    curves: Annotated[Path | None, typer.Option(help="PNG file for the curves over samples and wall time.")] = None,
) -> None:
    """Compare settings: mean ± standard deviation over seeds, best first.

    Example: python -m analysis compare runs/emoji_clip --metric eval-val/image_retrieval_recall@5 --curves curves.png
    """
    found = find_runs(runs)
    ranking, metrics, rows = table(found, metric)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED  # show every column in a file or pipe
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
        console.print(
            f"not shown, the terminal is too narrow: {printable(', '.join(metrics[fitting:]))}", soft_wrap=True
        )
    if curves is not None:
        draw_curves(found, [ranking, "train/loss"], curves)
        console.print(f"curves: {curves}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Usage errors print one line and return exit code 2."""
    return run_app(app, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
