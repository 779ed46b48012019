"""Wrong use, and how it is said: one line with the value, the expectation and the fix."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UsageError(ValueError):
    """Wrong use: one line with the value, the expectation and the fix; the process ends with exit code 2."""


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else the known names."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of: {', '.join(sorted(known))}" if known else "nothing is expected there"


@contextmanager
def usage_errors() -> Iterator[None]:
    """Inside the block a ValueError or a missing file is wrong use."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
