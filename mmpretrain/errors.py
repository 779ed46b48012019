"""Exceptions and their messages: one line with the value, the expectation and the fix."""

import difflib
import errno
import shutil
import site
import sysconfig
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(ValueError):
    """Invalid use, such as a wrong configuration value or input file. The process exits with code 2."""


class TrainingError(RuntimeError):
    """Failure because of which a run cannot continue."""


class Unreachable(OSError):
    """A remote storage did not give or take an object before the deadline, or says that it will not."""


class CacheError(OSError):
    """The cache of remote data cannot be used; the message names its settings."""


class Forbidden(Unreachable):
    """A remote storage forbids an object (status 403); a bucket that may not be listed says so of missing ones, too."""


def printable(text: str) -> str:
    """Escape the non-printable characters of a text, such as control characters that could manipulate a terminal."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `did you mean 'x'?` if a known name resembles `name`, else a list of the known names."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of: {', '.join(sorted(known))}" if known else "nothing is expected there"


def misspelt(
    kind: type, known: Collection[str], others: Collection[str] = (), renamed: Mapping[str, str] | None = None
) -> tuple[str, str] | None:
    """Search a class for a public name that resembles a known optional one. Names of torch's classes are left out.

    Args:
        kind: the class.
        known: optional names that a caller looks up.
        others: further names that are right.
        renamed: present name of each former one.

    Returns: (name, the known name that was probably meant), or None.
    """
    own = {name for base in kind.__mro__ if base.__module__.partition(".")[0] != "torch" for name in vars(base)}
    for name in sorted(own - {*known, *others}):
        meant = (renamed or {}).get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
        if meant is not None and not name.startswith("_"):
            return name, meant
    return None


def check_number(
    key: str,
    value: float,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Check that a number is within bounds.

    Raises: UsageError with the key, the value and the bounds if it is outside them or NaN.
    """
    bounds = {
        f"at least {at_least}": at_least is None or value >= at_least,
        f"above {above}": above is None or value > above,
        f"at most {at_most}": at_most is None or value <= at_most,
        f"below {below}": below is None or value < below,
    }
    if not all(bounds.values()):
        given = " and ".join(text for text in bounds if not text.endswith(" None"))
        raise UsageError(f"{key} is {value}; expected a number {given}: {key}=...")


def _place_outside(error: BaseException) -> str:
    """Name the last line of a user's own code in an error's traceback: no file of this package or of an installed one."""
    installed = [
        Path(__file__).resolve().parent,
        *map(Path, {*sysconfig.get_paths().values(), *site.getsitepackages()}),
    ]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_file() and not any(file.is_relative_to(folder) for folder in installed):
            return f" (in {file}, line {frame.lineno}; MMPRETRAIN_TRACEBACK=1 shows the traceback)"
    return ""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Convert a ValueError, a missing file, an unreachable storage, an unusable cache or a full disk to a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, FileNotFoundError, Unreachable, CacheError) as error:
        raise UsageError(f"{error}{_place_outside(error)}") from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UsageError(
            f"{error.filename or 'the output'} cannot be written ({error.strerror}); make space, then give the same command"
        ) from error


@contextmanager
def enough_space(folder: Path) -> Iterator[None]:
    """Convert an OSError for lack of disk space, or of the cache, inside the block to a TrainingError of one line.

    Raises: TrainingError.
    """
    try:
        yield
    except CacheError as error:
        raise TrainingError(f"{error}; the same command goes on") from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free / 2**20
        raise TrainingError(
            f"{error.filename or folder} cannot be written ({error.strerror}; {free:,.0f} MiB are free there); the last "
            "checkpoint is intact: make space, and the same command goes on"
        ) from error
