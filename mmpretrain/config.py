"""The configuration: its schema, its checks, the one instantiate, and what tells one run from another.

The schema stands first in the defaults list of conf/train.yaml, so that a typo fails in an experiment's YAML as
it does on the command line. What hangs below a `_target_` is checked against that callable's signature.
"""

import difflib
import functools
import hashlib
import importlib.resources
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from mmpretrain.seeds import torch_seed

USAGE_EXIT_CODE = 2
_MAX_NAME_LENGTH = 80

Node = dict[str, Any]
"""A `_target_` with its arguments."""


class UsageError(ValueError):
    """Wrong use: one line with the value, the expectation and the fix; the process ends with exit code 2."""


# ---------------------------------------------------------------------------------------------- schema


class Precision(Enum):
    """The arithmetic of the forward and backward passes; losses and parameters are float32 in both."""

    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class RunConfig:
    """Where a run lies and what it is seeded with."""

    name: str | None = None
    dir: str | None = None
    seed: int = 0


@dataclass
class TrainerConfig:
    """The loop; defaults stand in conf/train.yaml."""

    duration: str = MISSING
    batch_size: int = MISSING
    micro_batch_size: int | None = MISSING
    precision: Precision = MISSING
    clip_grad_norm: float | None = MISSING
    log_every: str = MISSING
    eval_every: str = MISSING
    max_bad_steps: int = MISSING
    device: str = MISSING


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: str = MISSING
    keep_last: int = MISSING


@dataclass
class SourceConfig:
    """One set of tars of a stream."""

    shards: Any = MISSING
    weight: float | None = None


@dataclass
class StreamConfig:
    """One stream of training samples."""

    shards: Any = None
    sources: dict[str, SourceConfig] | None = None
    batch_size: int | None = None
    caption: str | None = None
    transform: dict[str, Any] | None = None


@dataclass
class EvalSetConfig:
    """One held-out data set."""

    shards: Any = MISSING
    caption: str | None = None
    label: str | None = None
    classes: str | None = None
    class_column: str = "label"
    text_column: str | None = None
    templates: Any = "openai"


@dataclass
class DataConfig:
    """What is read, and how."""

    root: str = MISSING
    workers: int = MISSING
    max_bad_fraction: float = MISSING
    text_groups: int = MISSING
    tokenizer: dict[str, Any] = MISSING
    train: dict[str, StreamConfig] = field(default_factory=dict)
    val: dict[str, EvalSetConfig] = field(default_factory=dict)
    val_batch_size: int = MISSING


@dataclass
class TrainConfig:
    """Everything that `python -m mmpretrain.train` takes."""

    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = MISSING
    objective: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvalDataConfig:
    """The data sets of an evaluation; what is left out comes from the run."""

    root: str | None = None
    workers: int = MISSING
    val: dict[str, EvalSetConfig] = field(default_factory=dict)
    val_batch_size: int | None = MISSING


@dataclass
class EvaluateConfig:
    """Everything that `python -m mmpretrain.evaluate` takes."""

    checkpoint: str = MISSING
    output: str | None = None
    device: str = MISSING
    precision: Precision | None = MISSING
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    eval: dict[str, Any] = field(default_factory=dict)


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that the defaults lists use."""
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("evaluate_schema", EvaluateConfig)


# ---------------------------------------------------------------------------------------------- errors


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else the known names."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of: {', '.join(sorted(known))}" if known else "nothing is expected there"


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
    """One line on stderr; the whole traceback instead where `MMPRETRAIN_TRACEBACK` is set."""
    if os.environ.get("MMPRETRAIN_TRACEBACK"):
        raise error
    message = str(error) if isinstance(error, UsageError) else one_line(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Inside the block a ValueError or a missing file is wrong use."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def job() -> Iterator[None]:
    """Around a job of an entry: wrong use ends it in one line and with exit code 2."""
    try:
        yield
    except (UsageError, OmegaConfBaseException) as error:
        _say(error)
        end_job(USAGE_EXIT_CODE)


def entry(run: Callable[[], Any]) -> None:
    """Run a Hydra entry; wrong use ends in one line and exit code 2, `MMPRETRAIN_TRACEBACK=1` shows where it was met."""
    # Hydra then raises instead of printing and ending with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    try:
        if "WORLD_SIZE" in os.environ and any(argument in ("-m", "--multirun") for argument in sys.argv[1:]):
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


# ---------------------------------------------------------------------------------------------- targets


def _accepts(value: Any, annotation: Any) -> bool:
    """Whether a plain value fits a parameter's annotation; one that says nothing of plain values accepts all."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is None:
        return value is None
    if isinstance(value, dict) and "_target_" in value:
        return True
    if origin in (Union, UnionType):
        return any(_accepts(value, option) for option in options)
    if origin is Literal:
        return value in options
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    if kind in (Any, inspect.Parameter.empty) or not isinstance(kind, type):
        return True
    if issubclass(kind, Mapping):
        items = value.values() if isinstance(value, Mapping) else [None]
        return isinstance(value, Mapping) and (not options or all(_accepts(item, options[1]) for item in items))
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and options and Ellipsis not in options:
            return len(value) == len(options) and all(map(_accepts, value, options))
        return not options or all(_accepts(item, options[0]) for item in value)
    return isinstance(value, kind)


def _expected(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def check_targets(node: Any, path: str, runtime: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
    """Bind every `_target_` below a node to its callable's signature.

    Args:
        node: a resolved part of the configuration.
        path: its full name, for messages.
        runtime: parameters that are given when it is built.
        beside: keys of the node that are no arguments.

    Raises: UsageError for a target that cannot be imported, an unknown, missing or ill-typed argument.
    """
    if isinstance(node, list):
        for i, item in enumerate(node):
            check_targets(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_target(node, path, runtime, beside)
    for key, value in node.items():
        check_targets(value, f"{path}.{key}")


def _find(name: str) -> Any:
    """What a dotted name stands for. Raises: whatever its module raises while it is imported."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):  # `module` may be a class in a module
            return pkgutil.resolve_name(name)
        raise


def _check_target(node: Node, path: str, runtime: Sequence[str], beside: Sequence[str]) -> None:
    try:
        target = _find(node["_target_"])
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UsageError(
            f"{path}._target_ is {node['_target_']!r}, which cannot be imported ({type(error).__name__}: {error}); "
            "expected the full name of a class or function on the Python path"
        ) from error
    try:
        signature = inspect.signature(target, eval_str=True)
    except NameError:  # an annotation that only type checkers can look up
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        raise UsageError(f"{path}._target_ is {node['_target_']!r}; expected a class or function in Python") from None
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name not in runtime and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    for name, value in node.items():
        if name in ("_target_", "_partial_", *beside):
            continue
        if name not in parameters:
            if inspect.Parameter.VAR_KEYWORD in kinds and name not in runtime:
                continue
            raise UsageError(f"unknown configuration key '{path}.{name}'; {nearest(name, [*parameters, *beside])}")
        annotation = parameters[name].annotation
        if not _accepts(value, annotation):
            raise UsageError(f"{path}.{name} is {value!r}; expected {_expected(annotation)}: {path}.{name}=...")
    is_partial = node.get("_partial_") and not runtime
    for name, parameter in parameters.items():
        if name not in node and parameter.default is inspect.Parameter.empty and not is_partial:
            raise UsageError(f"{path}.{name} is missing; expected {_expected(parameter.annotation)}: {path}.{name}=...")


def instantiate(node: Any, seed: int, path: str, **runtime: Any) -> Any:
    """Build what a node describes, innermost first.

    Each object is built with torch's generators seeded from (seed, its path), so that adding one part to an
    experiment changes nobody else's initial weights.

    Args:
        node: a checked part of the configuration.
        seed: the run's seed.
        path: the node's full name.
        runtime: further arguments of the outermost target.
    """
    if isinstance(node, list):
        return [instantiate(item, seed, f"{path}[{i}]") for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {
        key: instantiate(value, seed, f"{path}.{key}")
        for key, value in node.items()
        if key not in ("_target_", "_partial_")
    }
    if "_target_" not in node:
        return arguments
    target = _find(node["_target_"])
    if node.get("_partial_"):
        return functools.partial(target, **arguments, **runtime)
    with torch_seed(seed, path):
        return target(**arguments, **runtime)


# ---------------------------------------------------------------------------------------------- identity

# What may differ between a run and its resumption: nothing here touches the mathematics beyond rounding.
_FREE = re.compile(
    r"run\.(name|dir)|trainer\.(micro_batch_size|log_every|eval_every|max_bad_steps|device)|checkpoint\..*|eval(\..*)?"
    r"|data\.(workers|root|max_bad_fraction|text_groups|val_batch_size|val(\..*)?)"
    r"|data\.train\.[^.]+\.(shards(\[.*)?|sources\.[^.]+\.shards.*)"
)


def resolve(cfg: DictConfig) -> TrainConfig:
    """The composed configuration as plain objects, every `_target_` checked. Raises: UsageError."""
    config: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    check_known(config)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UsageError(f"{missing[0]} has no value; give it one: {missing[0]}=...")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    experiment = choices.get("experiment") or "train"
    config.run.name = config.run.name or _derived_name()
    config.run.dir = config.run.dir or os.path.join("runs", str(experiment), config.run.name)
    _check_ranges(config)
    for path, part in (
        ("model", config.model),
        ("optimizer", config.optimizer),
        ("schedule", config.schedule),
        ("data.tokenizer", config.data.tokenizer),
    ):
        if "_target_" not in part:
            raise UsageError(f"{path} has no _target_; expected the full name of a class or function")
    check_targets(config.model, "model")
    check_targets(config.data.tokenizer, "data.tokenizer")
    for name, stream in config.data.train.items():
        check_targets(stream.transform, f"data.train.{name}.transform")
    for name, node in config.objective.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(
                f"unknown objective {name!r} below `objective`: it has no _target_; "
                "choose objectives with objective=[...], then override their arguments"
            )
        weight = node.get("weight", 1.0)
        if not _accepts(weight, float) or weight < 0:
            raise UsageError(f"objective.{name}.weight is {weight!r}; expected a number that is not negative")
        check_targets(node, f"objective.{name}", ("model",), ("weight",))
    check_targets(config.optimizer, "optimizer", ("parameters",))
    check_targets(config.schedule, "schedule")
    check_evaluators(config.eval)
    return config


def check_known(node: Any, path: str = "") -> None:
    """What `+key=value` added to a part of the schema that has no such key. Raises: UsageError."""
    if is_dataclass(node):
        known = [f.name for f in fields(node)]
        for name in vars(node):
            if name not in known:
                raise UsageError(f"unknown configuration key {path + name!r}; {nearest(name, known)}")
    if is_dataclass(node) or isinstance(node, dict):
        for name, value in (node if isinstance(node, dict) else vars(node)).items():
            check_known(value, f"{path}{name}.")


def _check_ranges(config: TrainConfig) -> None:
    trainer, data = config.trainer, config.data
    at_least: dict[str, tuple[float | None, int]] = {
        "trainer.batch_size": (trainer.batch_size, 1),
        "trainer.micro_batch_size": (trainer.micro_batch_size, 1),
        "trainer.max_bad_steps": (trainer.max_bad_steps, 1),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 0),
        "data.workers": (data.workers, 0),
        "data.text_groups": (data.text_groups, 1),
        "data.val_batch_size": (data.val_batch_size, 1),
        "data.max_bad_fraction": (data.max_bad_fraction, 0),
    }
    for name, stream in data.train.items():
        at_least[f"data.train.{name}.batch_size"] = (stream.batch_size, 1)
    for key, (value, least) in at_least.items():
        if value is not None and value < least:
            raise UsageError(f"{key} is {value}; expected at least {least}: {key}={least}")
    if trainer.clip_grad_norm is not None and not trainer.clip_grad_norm > 0:
        raise UsageError(
            f"trainer.clip_grad_norm is {trainer.clip_grad_norm}; expected a number above 0, or null for no clipping"
        )


def check_evaluators(nodes: Mapping[str, Any]) -> None:
    """Check each evaluator's node. Raises: UsageError."""
    for name, node in nodes.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(f"unknown evaluator {name!r} below `eval`: it has no _target_; choose with eval=[...]")
        check_targets(node, f"eval.{name}", beside=("every",))


def _derived_name() -> str:
    """A readable name from the overrides that touch the mathematics, with a short hash when it is long."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    # Parsed, since a sweep writes values in their canonical form: one job has one name, in a sweep or alone.
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {override.key_or_group: override.get_value_element_as_str() for override in parsed}
    parts = [f"{key}={value}" for key, value in values.items() if key != "experiment" and not _FREE.fullmatch(key)]
    # [infonce,mae] is written infonce+mae: the name is a folder's, and will be typed in shells.
    parts = [re.sub(r"[\[\]{}()'\" ]", "", part).replace(",", "+") for part in parts]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in sorted(parts)) or "default"
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as dictionaries, lists and plain values, the content of config.yaml."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def to_yaml(plain: Mapping[str, Any]) -> str:
    """The text of config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def from_yaml(text: str) -> dict[str, Any]:
    """What a config.yaml holds, as plain values; interpolations are not followed."""
    plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
    """What two configurations of one run differ in, as `key: saved -> now`, what may differ left out."""
    flat_saved, flat_now = _flat(dict(saved)), _flat(dict(now))
    keys = sorted({**flat_saved, **flat_now})
    return [
        f"{key}: {json.dumps(flat_saved.get(key, 'absent'))} -> {json.dumps(flat_now.get(key, 'absent'))}"
        for key in keys
        if flat_saved.get(key, "absent") != flat_now.get(key, "absent") and key not in free and not _FREE.fullmatch(key)
    ]
