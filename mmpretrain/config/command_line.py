"""How a command starts and ends: Hydra's entry, wrong use in one line, exit codes, jobs of a sweep."""

import importlib.resources
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from mmpretrain import distributed
from mmpretrain.config.schema import register_schemas
from mmpretrain.errors import UsageError, nearest, printable
from mmpretrain.schedules import SCHEDULE_TEXT

USAGE_EXIT_CODE = 2
_MULTIRUN = ("-m", "--multirun")
_PATHS = ("checkpoint", "data.root", "init_from", "output", "run.dir")
_ADDED = re.compile(r"(?P<sets>\+\+?data\.(train|val))\.(?P<inside>\w+(\.\w+)*)")


def _group_options(search_path: str, group: str) -> list[str]:
    """The names that a group has in the folders of Hydra's search path, as its message gives it."""
    folders = []
    for kind, place in re.findall(r"path=(file|pkg)://(\S+)", search_path):
        folder = place if kind == "file" else str(importlib.resources.files(place))
        folders.append(Path(folder, group))
    files = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def _unknown_key(error: OmegaConfBaseException) -> str:
    *parents, name = str(error.full_key).split(".")
    siblings = [str(key) for key in (error.parent_node or {}) if key != "_target_"]
    hint = nearest(name, siblings)
    if parents in (["objective"], ["eval"]):
        hint += f" (choose others with {parents[0]}=[{','.join([*siblings, '...'])}])"
    if parents in (["data", "train"], ["data", "val"]):
        hint += f" (add one with +data.{parents[1]}.{name}.shards=...)"
    return f"unknown configuration key {error.full_key!r}; {hint}"


def one_line(error: BaseException) -> str:
    """Hydra's, OmegaConf's and YAML's errors in one line: what is wrong, where, and the nearest thing that is right."""
    text = str(error)
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, name = missing.group(1).rpartition("/")
        options = re.findall(r"^\t(\S+)$", text.split("Available options")[-1], flags=re.MULTILINE)
        return (
            f"there is no {group or 'configuration'} {name!r}; {nearest(name, options or _group_options(text, group))}"
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
            return _unknown_key(cause)
        if isinstance(cause, MissingMandatoryValue) and cause.full_key:
            return f"{cause.full_key} has no value; give it one: {cause.full_key}=..."
        if isinstance(cause, ValidationError) and cause.full_key:
            return f"{cause.full_key}: {str(cause).splitlines()[0]}; give it a value of that type"
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


class JobFailed(Exception):
    """A job of a sweep has said why it ended, with this exit code; the jobs after it still run."""


def end_job(code: int) -> NoReturn:
    """End this process with an exit code; in a sweep only once its other jobs have run."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise JobFailed(code)
    raise SystemExit(code)


def _say(error: Exception) -> None:
    """One line on stderr; the whole traceback instead where `MMPRETRAIN_TRACEBACK` is set.

    Under torchrun the first process of each machine speaks for all: wrong use is the same on each of them.
    """
    if os.environ.get("MMPRETRAIN_TRACEBACK"):
        raise error
    if distributed.local_rank() != 0:
        return
    message = str(error) if isinstance(error, UsageError) else one_line(error)
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)


@contextmanager
def job() -> Iterator[None]:
    """Around a job of an entry: wrong use ends it in one line and with exit code 2, an error of a file with 1."""
    try:
        yield
    except (UsageError, OmegaConfBaseException) as error:
        _say(error)
        end_job(USAGE_EXIT_CODE)
    except OSError as error:
        _say(error)
        end_job(1)


def _parts(value: str) -> list[str]:
    """The values that a sweep takes one after the other: what stands between commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra reads it, from what people write.

    `-m` may stand anywhere, `debug=nan` names a preset and no number, a path may hold `=` and `,` as the names of
    our runs do, and brackets, and a stream or a held-out data set is added by `+data.train.NAME...=`: Hydra can add a whole
    dictionary to a typed one, and no part of it.
    """
    is_sweep = any(argument in _MULTIRUN for argument in arguments)
    changed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        parts = _parts(value)
        is_plain = bool(value) and value[0] not in "'\"[{"
        if argument == "debug=nan":
            argument = "debug='nan'"
        elif any(SCHEDULE_TEXT.match(part) for part in parts):
            # As a text, which `config.resolve` reads: a mapping would be merged with the breakpoints that are there.
            texts = [f"'{part}'" if SCHEDULE_TEXT.match(part) else part for part in parts]
            argument = f"{key}={','.join(texts)}"
        elif is_plain and "," in value and is_sweep:
            pass  # several values: each a job
        elif is_plain and key.lstrip("+") in _PATHS and re.search(r"[=,\[\](){}]", value):
            argument = f"{key}='{value}'"
        elif value and (added := _ADDED.fullmatch(key)):
            for name in reversed(added["inside"].split(".")):
                value = f"{{{name}: {value}}}"
            argument = f"{added['sets']}={value}"
        changed.append(argument)
    # Other options stay where they are: some are followed by their value.
    return sorted(changed, key=lambda argument: argument not in _MULTIRUN)


def entry(run: Callable[[], Any]) -> None:
    """Run a Hydra entry; wrong use ends in one line and exit code 2, `MMPRETRAIN_TRACEBACK=1` shows where it was met."""
    # Hydra then raises instead of printing and ending with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    try:
        if "WORLD_SIZE" in os.environ and any(argument in _MULTIRUN for argument in sys.argv):
            raise UsageError(
                "-m (multirun) was given under torchrun, where every process would start every job; "
                "run the sweep without torchrun, or give one job at a time to torchrun"
            )
        run()
    except (UsageError, HydraException, OmegaConfBaseException, YAMLError) as error:
        _say(error)
        raise SystemExit(USAGE_EXIT_CODE) from None
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's only one
            raise
        given = ", ".join(argument for argument in sys.argv[1:] if argument.endswith("=null"))
        _say(UsageError(f"{given}: a group cannot be null; leave it out, or choose none of a list with []"))
        raise SystemExit(USAGE_EXIT_CODE) from None
    except JobFailed as failed:
        raise SystemExit(failed.args[0]) from None
