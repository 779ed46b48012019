"""Entry point of a command line with several commands: one-line errors and exit codes."""

import io
import sys

import typer

try:
    from typer._click.exceptions import ClickException  # typer 0.26 and later have a copy of click
except ImportError:
    from click import ClickException  # type: ignore[assignment]


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
