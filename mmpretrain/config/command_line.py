"""Start and end of a command: Hydra entry, one-line messages for usage errors, exit codes, and jobs of a sweep."""

import importlib.resources
import inspect
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial, wraps
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from mmpretrain import distributed
from mmpretrain.config.checks import check_known
from mmpretrain.config.instantiate import find
from mmpretrain.config.key_help import KeyHelp
from mmpretrain.config.schema import register_schemas
from mmpretrain.errors import UsageError, nearest, printable
from mmpretrain.launchers import adopt_ranks, queued_jobs
from mmpretrain.schedules import SCHEDULE_TEXT

USAGE_EXIT_CODE = 2
_MULTIRUN = ("-m", "--multirun")
_HELP = ("-h", "--help")
_OPTIONS = {option for action in get_args_parser()._actions for option in action.option_strings}
_PATHS = re.compile(
    r"\+?(checkpoint|data\.root|eval\.\w+\.other|images|init_from|output|run\.dir|texts|data\.suite|data\.(train|val)\.(\w+\.)+(shards|subset|classes|wds))"
)
# Words that Hydra reads as a number, a Boolean or null; an option of a group may have such a name.
_NO_NAME = re.compile(
    r"(?<![^\s,\[])(null|true|false|[+-]?(inf|nan|\d[\d_]*\.?\d*(e[+-]?\d+)?))(?![^\s,\]])", re.IGNORECASE
)
_ADDED = re.compile(r"(?P<sets>\+\+?data\.(train|val))\.(?P<inside>\w+(\.\w+)*)")

Config = TypeVar("Config")


@cache
def _groups() -> frozenset[str]:
    """Return the names of the config groups."""
    return frozenset(each.name for each in importlib.resources.files("mmpretrain.conf").iterdir() if each.is_dir())


def _group_options(search_path: str, group: str) -> list[str]:
    """Return the options of a config group in the folders of a search path, which Hydra's error message lists."""
    folders = []
    for kind, place in re.findall(r"path=(file|pkg)://(\S+)", search_path):
        folder = place if kind == "file" else str(importlib.resources.files(place))
        folders.append(Path(folder, group))
    files = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def _parameters(target: str) -> Collection[str]:
    """Return the names of the parameters of a `_target_`, if it can be imported."""
    try:
        return inspect.signature(find(target)).parameters
    except Exception:  # a user's module may raise any exception during import; composing it reports that
        return ()


def _unknown_key(error: OmegaConfBaseException) -> str:
    *parents, name = str(error.full_key).split(".")
    siblings = [str(key) for key in (error.parent_node or {}) if key != "_target_"]
    target = (error.parent_node or {}).get("_target_")
    if target is not None and name in _parameters(target):
        return f"{error.full_key} is an argument that no YAML gives a value; add it: +{error.full_key}=..."
    hint = nearest(name, siblings)
    if parents in (["objective"], ["eval"], ["writer"]):
        hint += f" (choose others with {parents[0]}=[{','.join([*siblings, '...'])}])"
    if parents in (["data", "train"], ["data", "val"]):
        hint += f" (add one with +data.{parents[1]}.{name}.shards=...)"
    return f"unknown configuration key {error.full_key!r}; {hint}"


def one_line(error: BaseException) -> str:
    """Format an error of Hydra, OmegaConf or YAML in one line: the problem, its key and the nearest valid name."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        lines = [line for line in text.splitlines() if not line.startswith("Error parsing override")]
        problem = lines[0].removesuffix(error.override)
        return (
            f"{error.override!r} cannot be parsed ({problem.strip(' :')}); expected KEY=VALUE: one override for each "
            "argument, and quotes around special characters, as in 'KEY=\"VALUE\"'"
        )
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
    """A job failed and has logged its error."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class FailedJob:
    """Result of a failed job of a sweep, of which the other jobs still run.

    It counts, and prints its message, in the process of the command alone: there it is created by the basic launcher, and
    unpickled by launchers that run jobs in other processes.

    Args:
        code: exit code of the job.
        message: message with the job's overrides.
    """

    def __init__(self, code: int, message: str) -> None:
        self._arguments = code, message
        if _failures is not None:
            _failures.append(code)
            print(f"error: {message}", file=sys.stderr)

    def __reduce__(self) -> tuple[type["FailedJob"], tuple[int, str]]:
        return FailedJob, self._arguments


_failures: list[int] | None = None  # exit codes of this command's failed jobs; None in a launcher's process


def _keep_jobs_without_result() -> None:
    """Let submitit return a FailedJob for a job without a result, such as one that was killed, and wait for the others.

    Its launcher would raise the error of the first one, while the other jobs go on.
    """
    try:
        import submitit
    except ImportError:
        return
    results_of = submitit.Job.results

    def results(job: Any) -> list[Any]:
        """Return the results of the job's tasks, which are unpickled once: a FailedJob prints its message then."""
        if isinstance(job, submitit.SlurmJob):
            queued_jobs.add(job.job_id.partition("_")[0])  # of all jobs of the sweep, which are an array
        known, found = len(_failures or ()), []
        without: Any = None
        for task in map(job.task, range(job.num_tasks)):
            try:
                found += results_of(task)
            except submitit.core.utils.UncompletedJobError:
                without = without or task
        if without is None:
            return found
        if known == len(_failures or ()):  # no other task has reported why
            overrides, _, number, *_ = job.submission().args
            log = os.path.relpath(without.paths.stderr if without.paths.stderr.exists() else without.paths.stdout)
            FailedJob(
                1,
                f"job {number} has no result: a task of it was killed, stopped or failed; see {log}; the same command goes "
                f"on ({' '.join(overrides)})",
            )
        return [JobReturn(status=JobStatus.COMPLETED)]

    cast(Any, submitit.Job).results = results


def _is_other_task() -> bool:
    """Return True in all tasks but the first of a sweep's job. The first reports; submitit waits for a result of each."""
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    return is_sweep and os.environ.get("RANK", "0") != "0"


def _failed(error: Exception, code: int) -> FailedJob | None:
    """Return the result of a failed job in a sweep; otherwise print its error and end this process.

    Raises: SystemExit unless in a sweep; the error itself if `MMPRETRAIN_TRACEBACK` is set.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        if not isinstance(error, JobFailed):
            _say(error)
        raise SystemExit(code)
    if os.environ.get("MMPRETRAIN_TRACEBACK"):
        raise error
    if _is_other_task():
        return None
    job = HydraConfig.get()
    return FailedJob(code, f"{_message(error)} (job {job.job.num}: {' '.join(job.overrides.task)})")


def _say(error: Exception) -> None:
    """Print an error to stderr in one line, or raise it if `MMPRETRAIN_TRACEBACK` is set.

    Under torchrun and srun only local rank 0 prints, since a usage error is the same on all processes.
    """
    if os.environ.get("MMPRETRAIN_TRACEBACK"):
        raise error
    if distributed.local_rank() != 0:
        return
    print(f"error: {_message(error)}", file=sys.stderr)


def _message(error: Exception) -> str:
    message = str(error) if isinstance(error, UsageError | JobFailed) else one_line(error)
    return printable(" ".join(message.split()))


def _parts(value: str) -> list[str]:
    """Split the values of a sweep at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _quoted_path(path: str) -> str:
    """Quote a path that Hydra could not parse, unless it is a list, a call such as choice(a,b), or quoted already."""
    is_path = path and path[0] not in "'\"[{" and not re.match(r"\w+\(", path)
    return f"'{path}'" if is_path and re.search(r"[=,\[\](){}]", path) else path


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Convert command-line arguments to the form that Hydra accepts.

    - `-m` may be given at any position and is moved to the front.
    - Options of groups are names: `debug=nan` names a preset, so `nan` is quoted; Hydra would read a number.
    - A path may contain `=` and `,`, as names of runs do, and braces, as patterns of tars do. Such a path is quoted. In
      the list `checkpoints` commas separate the paths.
    - `+data.train.NAME.KEY=` and `+data.val.NAME.KEY=` add a stream or a held-out data set. They are rewritten to add a
      whole dictionary, since Hydra cannot add part of one to a typed dictionary.
    - A schedule is quoted, and `config.resolve` parses it.
    """
    is_sweep = any(argument in _MULTIRUN for argument in arguments)
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in _OPTIONS:
            raise UsageError(
                f"there is no option {option}; expected KEY=VALUE without dashes, such as {option[2:]}=..."
            )
    changed = []
    for argument in arguments:
        if argument.startswith("--help="):
            changed += argument.split("=", 1)
            continue
        key, is_given, value = argument.partition("=")
        parts = _parts(value)
        if key in _groups() and value != "null":  # of null there is a message of its own
            value = _NO_NAME.sub(r"'\g<0>'", value)
        elif any(SCHEDULE_TEXT.match(part) for part in parts):
            # Hydra would merge a mapping with the breakpoints of the YAML; `config.resolve` parses a string.
            value = ",".join(f"'{part}'" if SCHEDULE_TEXT.match(part) else part for part in parts)
        elif _PATHS.fullmatch(key):
            # Commas outside of brackets separate the values of a sweep; elsewhere they belong to the path.
            value = ",".join(map(_quoted_path, parts)) if is_sweep else _quoted_path(value)
        elif key == "checkpoints" and re.fullmatch(r"\[.*\]", value):
            value = f"[{','.join(map(_quoted_path, _parts(value[1:-1])))}]"
        if is_given and (added := _ADDED.fullmatch(key)):
            key = added["sets"]
            for name in reversed(added["inside"].split(".")):
                value = f"{{{name}: {value}}}"
        argument = f"{key}={value}" if is_given else argument
        changed.append(argument)
    # Other options keep their position, since some are followed by their value.
    return sorted(changed, key=lambda argument: argument not in _MULTIRUN)


def typed(cfg: DictConfig) -> Any:
    """Convert a composed configuration to its dataclass. Raises: UsageError for an unknown key; OmegaConfBaseException."""
    settings = OmegaConf.to_object(cfg)
    check_known(settings)
    return settings


def command(
    config_name: str, read: Callable[[DictConfig], Config] = typed
) -> Callable[[Callable[[Config], None]], Callable[[], None]]:
    """Make a function of a typed configuration the `main` of a command, which composes it from `sys.argv` by Hydra.

    A job ends with one line for usage errors and errors of the configuration (exit code 2), for OSError (exit code 1), and
    for JobFailed, whose message the function has logged. `MMPRETRAIN_TRACEBACK=1` raises them instead.

    Args:
        config_name: name of the primary configuration in `conf/`.
        read: function that converts the composed configuration.
    """

    def decorate(run: Callable[[Config], None]) -> Callable[[], None]:
        @wraps(run)  # Hydra names the job after the function's module
        def job(cfg: DictConfig) -> FailedJob | None:
            try:
                adopt_ranks()  # of a task of submitit, which does not start at `_enter`
                run(read(cfg))
            except (UsageError, OmegaConfBaseException) as error:
                return _failed(error, USAGE_EXIT_CODE)
            except OSError as error:
                return _failed(error, 1)
            except JobFailed as failed:
                return _failed(failed, failed.code)
            except SystemExit as stopped:
                if multiprocessing.current_process().name.startswith("LokyProcess"):
                    os._exit(int(stopped.code or 0))  # joblib would give its worker the next job
                if not _is_other_task():
                    raise
            finally:
                distributed.shut_down()
            return None

        compose = hydra.main(version_base="1.3", config_path="pkg://mmpretrain.conf", config_name=config_name)
        return partial(_enter, config_name, compose(job))

    return decorate


def _key_help(command: str, arguments: Sequence[str]) -> str | None:
    """Return the help for the key that follows `--help`, or None if none does."""
    for i, (option, key) in enumerate(pairwise(arguments)):
        if option in _HELP and "=" not in key and not key.startswith("-"):
            overrides = [*arguments[:i], *arguments[i + 2 :]]
            if others := [other for other in overrides if "=" not in other and not other.startswith("~")]:
                raise UsageError(
                    f"--help {key} was given with {others[0]}; expected overrides only, such as experiment=NAME"
                )
            return KeyHelp(command, overrides).text(key)
    return None


def _uncomposed(error: Exception, arguments: Sequence[str]) -> str:
    """Return the message for an error of Hydra or OmegaConf that is not meant for users."""
    if str(error).startswith("Config group override"):
        given = ", ".join(argument for argument in arguments if argument.endswith("=null"))
        return f"{given}: a group cannot be null; leave it out, or choose none of a list with []"
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"{' '.join(arguments)}: these overrides cannot be composed ({type(error).__name__}: {reason}); expected names in "
        "the lists of groups, a list for a list, and + before a mapping that replaces null: '+KEY={...}'"
    )


def _of_launcher(error: Exception) -> str:
    """Return the message for an error of a launcher that could not start the jobs, or has lost a process."""
    reason = next(iter(str(error).splitlines()), "").rstrip(".")
    return (
        f"the launcher of the jobs failed ({type(error).__name__}: {reason}); choose another one with sweep=..., or start "
        "the same command again, which goes on"
    )


def _enter(name: str, run: Callable[[], None]) -> None:
    """Run the Hydra entry of a command, or print the help for one key.

    Usage errors print one line and exit with code 2. Failed jobs of a sweep set the exit code.
    """
    global _failures
    _failures = []
    # Hydra then raises errors instead of printing them and exiting with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    try:
        adopt_ranks()
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
        if (text := _key_help(name, sys.argv[1:])) is not None:
            print(text)
            return
        if any(argument in _MULTIRUN for argument in sys.argv):
            if "WORLD_SIZE" in os.environ:
                raise UsageError(
                    "-m (multirun) was given under torchrun or srun, where every process would start every job; "
                    "run the sweep without torchrun or srun, or give them one job at a time"
                )
            _keep_jobs_without_result()
        run()
    except (UsageError, HydraException, OmegaConfBaseException, YAMLError) as error:
        _say(error)
        raise SystemExit(USAGE_EXIT_CODE) from None
    except Exception as error:  # Hydra and OmegaConf raise various exceptions for some overrides
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        # A launcher raises the error of a job in another process from its result.
        if HydraConfig.initialized() or any(frame.f_code.co_name == "return_value" for frame in frames):
            raise
        if any(frame.f_globals.get("__name__", "").startswith("hydra_plugins.") for frame in frames):
            _say(JobFailed(_of_launcher(error)))
            raise SystemExit(1) from None
        _say(UsageError(_uncomposed(error, sys.argv[1:])))
        raise SystemExit(USAGE_EXIT_CODE) from None
    if _failures:
        raise SystemExit(_failures[0])
