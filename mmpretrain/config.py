"""The configuration: its schema, its checks, the one instantiate, and what tells one run from another.

The schema stands first in the defaults list of conf/train.yaml, so that a typo fails in an experiment's YAML as
it does on the command line. What hangs below a `_target_` is checked against that callable's signature.
"""

import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
    batch_size: int = MISSING
    caption: str | None = None
    transform: dict[str, Any] | None = None
    image_size: int = MISSING


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
    val_batch_size: int = MISSING


@dataclass
class EvaluateConfig:
    """Everything that `python -m mmpretrain.evaluate` takes."""

    checkpoint: str = MISSING
    output: str | None = None
    device: str = MISSING
    precision: Precision = MISSING
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


def _schema_fields(path: Sequence[str]) -> list[str]:
    """The names that the schema has below a dotted path, as far as it goes."""
    kind: Any = TrainConfig
    for part in path:
        if is_dataclass(kind):
            kind = next((f.type for f in fields(kind) if f.name == part), None)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        if get_origin(kind) is UnionType:
            kind = next(option for option in get_args(kind) if option is not NoneType)
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors in one line: what is wrong, where, and the nearest thing that is right."""
    text = str(error)
    cause = error.__cause__ or error.__context__
    details = f"{text}\n{cause or ''}"
    if key := re.search(r"Key '([^']+)' (?:is )?not in '(\w+)'", details):
        full = re.search(r"full_key: (\S+)", details)
        path = full.group(1) if full else key.group(1)
        hint = nearest(key.group(1), _schema_fields(path.split(".")[:-1]))
        return f"unknown configuration key {path!r}; {hint}"
    if override := re.search(r"Could not override '([^']+)'", text):
        *parents, name = override.group(1).split(".")
        return f"unknown configuration key {override.group(1)!r}; {nearest(name, _schema_fields(parents))}"
    if missing := re.search(r"Could not find '([^']+)'", text):
        options = re.findall(r"^\s+(\S+)$", text.split("Available options")[-1], flags=re.MULTILINE)
        group, _, name = missing.group(1).rpartition("/")
        return f"there is no {group or 'configuration'} {name!r}; {nearest(name, options)}"
    if value := re.search(r"(Value '.*' .*could not be converted.*|Invalid value .*|Incompatible value .*)", details):
        full = re.search(r"full_key: (\S+)", details)
        return f"{full.group(1) if full else 'configuration'}: {value.group(1)}; give it a value of that type"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _fail(message: str, code: int = USAGE_EXIT_CODE) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Inside the block a ValueError or a missing file is wrong use."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def entry(run: Callable[[], Any]) -> None:
    """Run a Hydra entry; wrong use ends in one line and exit code 2, `MMPRETRAIN_TRACEBACK=1` shows where it was met."""
    if "WORLD_SIZE" in os.environ and any(argument in ("-m", "--multirun") for argument in sys.argv[1:]):
        _fail(
            "-m (multirun) was given under torchrun, where every process would start every job; "
            "run the sweep without torchrun, or give one job at a time to torchrun"
        )
    # Hydra then raises instead of printing and ending with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    try:
        run()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("MMPRETRAIN_TRACEBACK"):
            raise
        _fail(str(error) if isinstance(error, UsageError) else one_line(error))


# ---------------------------------------------------------------------------------------------- targets


def _accepts(value: Any, annotation: Any) -> bool:
    """Whether a plain value fits a parameter's annotation."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty) or (isinstance(value, dict) and "_target_" in value):
        return True
    if origin in (Union, UnionType):
        return any(_accepts(value, option) for option in options)
    if origin is Literal:
        return value in options
    if annotation in (None, NoneType):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if origin is tuple and Ellipsis not in options:
        return _is_list(value) and len(value) == len(options) and all(map(_accepts, value, options))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_accepts(item, options[1]) for item in value.values())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _is_list(value) and all(_accepts(item, options[0]) for item in value)
    return not isinstance(value, str | int | float | list | dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _expected(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def check_targets(node: Any, path: str, runtime: Sequence[str] = ()) -> None:
    """Bind every `_target_` below a node to its callable's signature.

    Args:
        node: a resolved part of the configuration.
        path: its full name, for messages.
        runtime: parameters that are given when it is built.

    Raises: UsageError for a target that cannot be imported, an unknown, missing or ill-typed argument.
    """
    if isinstance(node, list):
        for i, item in enumerate(node):
            check_targets(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_target(node, path, runtime)
    for key, value in node.items():
        check_targets(value, f"{path}.{key}")


def _check_target(node: Node, path: str, runtime: Sequence[str]) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UsageError(
            f"{path}._target_ is {node['_target_']!r}, which cannot be imported ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); expected the full name of a class or function on the Python path"
        ) from error
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if name not in runtime and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    for name, value in node.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in parameters:
            raise UsageError(f"unknown configuration key {path}.{name!s}; {nearest(name, list(parameters))}")
        annotation = parameters[name].annotation
        if not _accepts(value, annotation):
            raise UsageError(f"{path}.{name} is {value!r}; expected {_expected(annotation)}")
    for name, parameter in parameters.items():
        if name not in node and parameter.default is inspect.Parameter.empty and not node.get("_partial_"):
            raise UsageError(f"{path}.{name} is missing; expected {_expected(parameter.annotation)}")


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
    target = get_object(node["_target_"])
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
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UsageError(f"{missing[0]} has no value; give it one: {missing[0]}=...")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    experiment = choices.get("experiment") or "train"
    config.run.name = config.run.name or _derived_name()
    config.run.dir = config.run.dir or os.path.join("runs", str(experiment), config.run.name)
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
        check_targets({key: value for key, value in node.items() if key != "weight"}, f"objective.{name}", ("model",))
    check_targets(config.optimizer, "optimizer", ("parameters",))
    check_targets(config.schedule, "schedule")
    check_evaluators(config.eval)
    return config


def check_evaluators(nodes: Mapping[str, Any]) -> None:
    """Check each evaluator's node. Raises: UsageError."""
    for name, node in nodes.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(f"unknown evaluator {name!r} below `eval`: it has no _target_; choose with eval=[...]")
        check_targets({key: value for key, value in node.items() if key != "every"}, f"eval.{name}")


def _derived_name() -> str:
    """A readable name from the overrides that touch the mathematics, with a short hash when it is long."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    parts = [override.lstrip("+") for override in overrides]
    parts = [part for part in parts if not part.startswith("experiment=") and not _FREE.fullmatch(part.split("=")[0])]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part).strip("_") for part in sorted(parts)) or "default"
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
