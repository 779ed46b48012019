"""The command line: `python -m analysis COMMAND`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from analysis import forgetting as forgotten
from analysis import interpolation as between
from analysis.compare import cell, draw_curves, table
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


@app.command()
def forgetting(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of runs with init_from, or folders that contain them.")
    ],
    metric: Annotated[
        list[str] | None, typer.Option(help="Score to show, such as eval-val/acc1; default: all.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
    curves: Annotated[Path | None, typer.Option(help="PNG file for the scores over the samples seen.")] = None,
) -> None:
    """Compare scores of runs with those of the runs whose weights they began with (init_from): mean ± sd over seeds.

    Data sets of the same name in data.val are compared; others have no score before. The interval is that of the difference
    over samples of the data set.

    Example: python -m analysis forgetting runs/continual_clip --metric eval-val/image_retrieval_recall@5
    """
    pairs = forgotten.pairs_of(find_runs(runs))
    rows = forgotten.table(pairs, metric or ())
    _print_table(f"{len(pairs)} runs", forgotten.COLUMNS, [row.cells() for row in rows])
    if markdown is not None:
        markdown.write_text(forgotten.markdown(rows), encoding="utf-8")
    if curves is not None:
        forgotten.draw_curves(pairs, list(dict.fromkeys(row.metric for row in rows)), curves)


@app.command()
def interpolation(
    folders: Annotated[
        list[Path], typer.Argument(help="Outputs of mmpretrain.interpolate, such as one for each seed.")
    ],
    x: Annotated[str, typer.Option(help="Score on one data set, such as eval-new/acc1.")],
    y: Annotated[str, typer.Option(help="Score on another data set, such as eval-val/image_retrieval_recall@5.")],
    curve: Annotated[Path | None, typer.Option(help="PNG file for y over x.")] = None,
) -> None:
    """Compare scores of interpolated checkpoints on two data sets (WiSE-FT): mean ± sd over folders.

    It reads FOLDER/alpha_<share>/scores.json, the output of mmpretrain.evaluate.

    Example: python -m analysis interpolation between --x eval-new/acc1 --y eval-val/acc1 --curve wise_ft.png
    """
    points = between.read_points(folders, x, y)
    rows = [[f"{point.alpha:g}", cell(point.x), cell(point.y)] for point in points]
    _print_table(f"{len(folders)} folders", ("alpha", x, y), rows)
    if curve is not None:
        between.draw(points, x, y, curve)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED  # show every column in a file or pipe
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(printable(column), overflow="fold")
    for row in rows:
        shown.add_row(*map(printable, row))
    console.print(shown)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Usage errors print one line and return exit code 2."""
    return run_app(app, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
