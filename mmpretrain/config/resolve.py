"""Resolution and checks of the configuration, and comparison of runs' configurations. The schema is in schema.py."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from yaml import YAMLError

from mmpretrain import files
from mmpretrain.config.instantiate import accepts, check_targets
from mmpretrain.config.schema import EvaluateConfig, TrainConfig
from mmpretrain.errors import UsageError, check_number, nearest
from mmpretrain.schedules import SCHEDULE_TEXT, Duration, ScheduledValue

_MAX_NAME_LENGTH = 80
_MAX_YAML_BYTES = 1 << 18
"""About 50 times the size of a config.yaml; parsing this much takes about five seconds."""
_MAX_YAML_DEPTH = 50

# Locations of the data may change when a run is resumed, since the checkpoint has a fingerprint of the data. Locations
# given on the command line are still part of the run's name, so that a sweep over data.root makes separate runs.
_PLACES = r"data\.root|data\.train\.[^.]+\.(sources\.[^.]+\.)?(shards|subset)(\[.*)?"
# Keys that may change when a run is resumed. None of them affects the results beyond rounding.
_FREE = re.compile(
    r"run\.(name|dir)"
    r"|trainer\.(micro_batch_size|log_every|diagnose_every|eval_every|max_bad_steps|device|dry_run|profile_steps|detect_anomaly)|checkpoint\..*|eval(\..*)?|parallel\..*"
    r"|data\.(workers|timeout_seconds|max_bad_fraction|val_batch_size|val(\..*)?)|" + _PLACES
)


# Values that applied to runs made before these keys existed.
_BEFORE: Mapping[str, Any] = {"data.max_image_bytes": 1 << 29}


def resolve(cfg: DictConfig) -> TrainConfig:
    """Convert the composed configuration to plain objects and check it, including every `_target_`. Raises: UsageError."""
    _read_schedules(cfg)
    take_what_is_present(cfg)
    config: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    check_known(config)
    config.from_environment = _from_environment(cfg)
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
        check_targets(stream.augment, f"data.train.{name}.augment")
    for name, node in config.objective.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(
                f"unknown objective {name!r} below `objective`: it has no _target_; "
                "choose objectives with objective=[...], then override their arguments"
            )
        check_value(f"objective.{name}.weight", node.get("weight", 1.0), at_least=0)
        check_targets(node, f"objective.{name}", ("model", "config_path"), ("weight",))
    check_targets(config.optimizer, "optimizer", ("parameters",))
    check_targets(config.schedule, "schedule")
    check_evaluators(config.eval)
    return config


def _from_environment(cfg: DictConfig) -> dict[tuple[str | int, ...], str]:
    """Return the unresolved text of each value that comes from an environment variable, by its path of keys.

    Of OmegaConf's resolvers (create, decode, deprecated, dict.keys, dict.values, env, select) only env reads the
    environment.
    """
    asked: list[str] = []

    def env(*arguments: Any) -> Any:
        asked.append(str(arguments[0]))
        return oc.env(*arguments)

    def search(node: Any, written: Any, place: tuple[str | int, ...]) -> None:
        for key, text in written.items() if isinstance(written, dict) else enumerate(written):
            if isinstance(text, dict | list):
                search(node[key], text, (*place, key))
            elif isinstance(text, str) and "${" in text:
                asked.clear()
                value = node[key]
                if OmegaConf.is_config(value):
                    OmegaConf.to_container(value, resolve=True)
                if asked:
                    found[(*place, key)] = text

    found: dict[tuple[str | int, ...], str] = {}
    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        search(cfg, OmegaConf.to_container(cfg, resolve=False), ())
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return found


def _read_schedules(cfg: DictConfig) -> None:
    """Parse schedules of the command line; each replaces the YAML's schedule entirely. Raises: UsageError."""
    for path, value in _flat(OmegaConf.to_container(cfg, resolve=False)).items():
        if isinstance(value, str) and SCHEDULE_TEXT.match(value):
            try:
                schedule = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]  # type: ignore[call-overload, index]
            except YAMLError:
                example = "{linear: {0%: 0, 20%: 0.1}}"
                raise UsageError(
                    f"{path} is {value}, which cannot be parsed; check its braces and commas, expected such as {example}"
                ) from None
            OmegaConf.update(cfg, path, schedule, merge=False)


def take_what_is_present(cfg: DictConfig) -> None:
    """Apply each value of `if_present` whose parent key exists in the configuration.

    `size=tiny` and presets have values for parts that an experiment may lack, and a defaults list cannot express this
    condition. Overrides of the command line take precedence.
    """
    given: set[str] = set()
    for override in _overrides():
        key, value = override.key_or_group.lstrip("+"), override.value()
        given |= {f"{key}.{leaf}" for leaf in _flat(value)} if isinstance(value, dict) and value else {key}
    for path, value in _flat(OmegaConf.to_container(cfg.if_present, resolve=False)).items():
        part = OmegaConf.select(cfg, path.rpartition(".")[0])
        if path and isinstance(part, DictConfig) and path not in given:
            OmegaConf.update(cfg, path, value, force_add=True)
    cfg.if_present = {}


def _overrides() -> list[Override]:
    """Return the overrides of the command line with unresolved interpolations."""
    if not HydraConfig.initialized():
        return []
    written: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[assignment]
    return OverridesParser.create().parse_overrides(written)


def check_known(node: Any, path: str = "") -> None:
    """Raises: UsageError if `+key=value` added a key that is not in the schema."""
    if is_dataclass(node):
        known = [f.name for f in fields(node)]
        for name in vars(node):
            if name not in known:
                raise UsageError(f"unknown configuration key {path + name!r}; {nearest(name, known)}")
    if is_dataclass(node) or isinstance(node, dict):
        for name, value in (node if isinstance(node, dict) else vars(node)).items():
            check_known(value, f"{path}{name}.")


def _check_durations(config: TrainConfig) -> None:
    trainer = config.trainer
    duration = Duration.parse(trainer.duration, "trainer.duration")
    if duration.unit == "%":
        raise UsageError(
            f"trainer.duration is {trainer.duration!r}, a percentage of itself; expected epochs, samples or steps"
        )
    if not duration.value > 0:
        raise UsageError(f"trainer.duration is {trainer.duration!r}; expected a length above 0, such as 20epochs")
    Duration.parse(trainer.log_every, "trainer.log_every")
    if trainer.diagnose_every is not None:
        Duration.parse(trainer.diagnose_every, "trainer.diagnose_every")
    Duration.parse(config.checkpoint.every, "checkpoint.every", wall_time=True)
    for part, until in (trainer.freeze or {}).items():
        if until is not None:
            Duration.parse(until, f"trainer.freeze.{part}")


def _check_ranges(config: TrainConfig) -> None:
    trainer, data = config.trainer, config.data
    check_number("trainer.batch_size", trainer.batch_size, at_least=1)
    if trainer.micro_batch_size is not None:
        check_number("trainer.micro_batch_size", trainer.micro_batch_size, at_least=1)
    if trainer.clip_grad_norm is not None:
        check_number("trainer.clip_grad_norm", trainer.clip_grad_norm, above=0)
    if not accepts(trainer.freeze, Mapping[str, str | None] | None):
        raise UsageError(
            f"trainer.freeze is {trainer.freeze!r}; expected parts of the model with a duration or null each: "
            "trainer.freeze={image: null, text: 10%}"
        )
    _check_durations(config)
    if trainer.ema_decay is not None:
        check_value("trainer.ema_decay", trainer.ema_decay, at_least=0, below=1)
    check_number("trainer.max_bad_steps", trainer.max_bad_steps, at_least=1)
    check_number("checkpoint.keep_last", config.checkpoint.keep_last, at_least=0)
    if data.workers != "auto":
        if not accepts(data.workers, int):
            raise UsageError(f"data.workers is {data.workers!r}; expected auto or a number of processes, such as 4")
        check_number("data.workers", data.workers, at_least=0)
    check_number("data.val_batch_size", data.val_batch_size, at_least=1)
    check_number("data.timeout_seconds", data.timeout_seconds, above=0)
    check_number("parallel.timeout_seconds", config.parallel.timeout_seconds, above=0)
    check_number("data.max_image_bytes", data.max_image_bytes, at_least=1)
    check_number("data.max_bad_fraction", data.max_bad_fraction, at_least=0, at_most=1)
    for name, stream in data.train.items():
        if stream.max_samples is not None:
            check_number(f"data.train.{name}.max_samples", stream.max_samples, at_least=1)
        if stream.repeat_batches is not None:
            check_number(f"data.train.{name}.repeat_batches", stream.repeat_batches, at_least=1)
        for key, least in (("batch_size", 1), ("image_size", 1), ("text_length", 3)):
            if (value := getattr(stream, key)) is not None:
                check_value(f"data.train.{name}.{key}", value, is_whole=True, at_least=least)


def check_value(key: str, value: Any, is_whole: bool = False, **bounds: float) -> None:
    """Raises: UsageError for a value that is not a number or a schedule of numbers, or that is out of bounds."""
    numbers = ScheduledValue(value, key, in_stages=is_whole, **bounds).values
    if is_whole and not all(isinstance(number, int) for number in numbers):
        raise UsageError(f"{key} is {value!r}; expected whole numbers")


def check_evaluate_ranges(config: EvaluateConfig) -> None:
    """Raises: UsageError if a number of an evaluation's configuration is out of range."""
    check_number("data.workers", config.data.workers, at_least=0)
    if config.data.val_batch_size is not None:
        check_number("data.val_batch_size", config.data.val_batch_size, at_least=1)


def check_evaluators(nodes: Mapping[str, Any]) -> None:
    """Check each evaluator's node. Raises: UsageError."""
    for name, node in nodes.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(f"unknown evaluator {name!r} below `eval`: it has no _target_; choose with eval=[...]")
        check_targets(node, f"eval.{name}", beside=("every",))


def _derived_name() -> str:
    """Return a readable name made of the overrides that affect results or data. Long names end in a short hash."""
    values: dict[str, str] = {}
    # Parse the overrides, since a sweep writes values in canonical form: a job then has the same name in a sweep or alone.
    for override in _overrides():
        key, value = override.key_or_group, override.get_value_element_as_str()
        # +data.train={images: ...} adds to an earlier override; any other override replaces it.
        values[key] = f"{values[key]}+{value}" if key in values and value.startswith("{") else value
    named = {k: v for k, v in values.items() if re.fullmatch(_PLACES, k) or not _FREE.fullmatch(k)}
    parts = [f"{key}={value}" for key, value in named.items() if key not in ("experiment", "sweep")]
    # [infonce,mae] becomes infonce+mae, since the name is a folder that is typed in shells.
    parts = [re.sub(r"[\[\]{}()'\" ]", "", part).replace(",", "+") for part in parts]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in sorted(parts)) or "default"
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def hparams(config: TrainConfig) -> dict[str, str | float | bool]:
    """Return the main settings of a run for TensorBoard's table, which needs the same keys for every run."""
    values = to_values(config)

    def shown(*place: str) -> Any:
        """Return the value at a path of keys, its unresolved text if it comes from the environment, or None if absent."""
        node: Any = values
        for i, key in enumerate(place, start=1):
            if text := config.from_environment.get(place[:i]):
                return text
            node = node.get(key)
        return node

    def named(part: str) -> str:
        return str(shown(part, "name") or shown(part, "_target_").rpartition(".")[2])

    weights = {name: shown("objective", name, "weight") for name in values["objective"]}
    return {
        "name": str(shown("run", "name")),
        "seed": shown("run", "seed"),
        "objective": "+".join(
            f"{_shown(1.0 if weight is None else weight)} {name}" for name, weight in weights.items()
        ),
        "model": named("model"),
        "batch_size": shown("trainer", "batch_size"),
        "duration": shown("trainer", "duration"),
        "precision": shown("trainer", "precision"),
        "optimizer": named("optimizer"),
        "lr": _number(shown("optimizer", "lr") or 0.0),
        "weight_decay": _number(shown("optimizer", "weight_decay") or 0.0),
        "schedule": shown("schedule", "_target_").rpartition(".")[2],
        "ema_decay": _shown(shown("trainer", "ema_decay") or 0.0),
        "init_from": shown("init_from") or "",
        "data": shown("data", "root"),
    }


def _number(value: Any) -> str | float:
    """Return a number as a float, and the text of a value from the environment unchanged."""
    return value if isinstance(value, str) else float(value)


def _shown(value: Any) -> str:
    """Return a scheduled value as a short text: the number, or the name of the schedule."""
    return f"{value:g}" if isinstance(value, int | float) else value if isinstance(value, str) else next(iter(value))


def to_values(config: TrainConfig) -> dict[str, Any]:
    """Convert the configuration to dictionaries, lists and plain values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """Return the content of config.yaml: `to_values` with values from the environment left unresolved.

    Such values may be secrets and are not part of the run.
    """
    plain = to_values(config)
    for (*parents, key), text in config.from_environment.items():
        node: Any = plain
        for parent in parents:
            node = node[parent]
        node[key] = text
    return plain


def to_yaml(plain: Mapping[str, Any]) -> str:
    """Return the text of config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def read(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml as plain values, without resolving interpolations.

    Raises: FileNotFoundError if it does not exist; ValueError if its content is invalid (see `from_yaml`).
    """
    return from_yaml(files.read_text(path, _MAX_YAML_BYTES), str(path))


def from_yaml(text: str, name: str = "config.yaml") -> dict[str, Any]:
    """Parse the text of a config.yaml to plain values, without resolving interpolations.

    Raises: ValueError that names the file if the text is not a YAML mapping of plain values, has aliases or is nested too
        deeply.
    """
    try:
        _check_structure(text, name)
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no YAML of a run ({reason}); expected it as the run wrote it") from error
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} has an invalid value ({error}); expected it as the run wrote it") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{name} holds no keys; expected it as the run wrote it")
    _check_plain(plain, name)
    return plain  # type: ignore[return-value]


def _check_structure(text: str, name: str) -> None:
    """Raises: ValueError for aliases and deep nesting, since a few lines of aliases can expand to billions of values."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise ValueError(f"{name} has an alias (*{event.anchor} in line {line}); expected values written out")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if depth > _MAX_YAML_DEPTH:
                line = event.start_mark.line + 1
                raise ValueError(f"{name} nests deeper than {_MAX_YAML_DEPTH} levels in line {line}")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1


def _check_plain(value: Any, path: str) -> None:
    """Raises: ValueError for bytes, paths and other types of YAML that a run does not write."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"{path} has the key {key!r}; expected names")
            _check_plain(item, f"{path}: {key}" if path.endswith(".yaml") else f"{path}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, f"{path}[{i}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"{path} is {value!r}; expected a text, a number, true, false or null")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their full names."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a configuration by their full names, without keys that may change when a run is resumed."""
    return {key: value for key, value in {**_BEFORE, **_flat(dict(plain))}.items() if not _FREE.fullmatch(key)}


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the differences of two configurations of a run as `key: saved -> now`, without keys that may change.

    Args:
        saved, now: configurations in the form of `to_plain`.
        free: further keys that may change.
        values: `now` in the form of `to_values`, which earlier versions saved.
    """
    flats = [_flat(dict(plain)) for plain in (saved, now, values or now)]
    all_three = {
        key: [flat.get(key, _BEFORE.get(key, "absent")) for flat in flats] for key in sorted({**flats[0], **flats[1]})
    }
    return [
        f"{key}: {json.dumps(before)} -> {json.dumps(after)}"
        for key, (before, after, value) in all_three.items()
        if before not in (after, value) and key not in free and not _FREE.fullmatch(key)
    ]
