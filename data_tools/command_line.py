"""Parts of a command line with several commands: options, tables, one-line errors and exit codes."""

import io
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.pool import num_cpus

try:
    from typer._click.exceptions import ClickException  # typer 0.26 and later have a copy of click
except ImportError:
    from click import ClickException  # type: ignore[assignment]

Workers = Annotated[
    int, typer.Option(min=1, help="Number of processes.", default_factory=num_cpus, show_default="all cores")
]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_text_columns: int | None = None) -> None:
    """Print a table; with no rows, nothing.

    Args:
        columns: headings.
        rows: cells of each row, as plain text.
        num_text_columns: number of columns that are aligned left; the others hold numbers. None: all.
    """
    table = Table()
    for i, column in enumerate(columns):
        is_text = num_text_columns is None or i < num_text_columns
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    if table.row_count:
        # Do not wrap lines in a file or a pipe, where rich would assume a width of 80.
        Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def run_app(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run one command of an app and return its exit code: 2, with a one-line message, for errors; 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        return app(arguments, standalone_mode=False) or 0
    except ClickException as error:
        message = error.format_message()
        print(f"error: {_given(arguments, error)}{message} (--help shows the options)", file=sys.stderr)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        # A file name may contain terminal control sequences.
        shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
        print(f"error: {shown}", file=sys.stderr)
    except typer.Abort:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _given(arguments: list[str], error: Exception) -> str:
    """Return the option and the value that caused an error, which its message leaves out."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        if name in names:
            return f"{name} {value if equals else following!r}: "
    return ""
