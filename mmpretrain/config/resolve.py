"""The configuration: its checks, and what tells one run from another. Its schema is in schema.py."""

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
"""Some 50 times a config.yaml; so much takes some five seconds to parse."""
_MAX_YAML_DEPTH = 50

# Where the data lie may change between a run and its resumption (which data they are is in the checkpoint), but what
# was named on the command line tells runs apart: a sweep over data.root has a run for each.
_PLACES = r"data\.root|data\.train\.[^.]+\.(sources\.[^.]+\.)?(shards|subset)(\[.*)?"
# What may differ between a run and its resumption: nothing here touches the mathematics beyond rounding.
_FREE = re.compile(
    r"run\.(name|dir)"
    r"|trainer\.(micro_batch_size|log_every|diagnose_every|eval_every|max_bad_steps|device|dry_run|profile_steps|detect_anomaly)|checkpoint\..*|eval(\..*)?|parallel\..*"
    r"|data\.(workers|timeout_seconds|max_bad_fraction|val_batch_size|val(\..*)?)|" + _PLACES
)


# What runs went by that were started before these keys were there.
_BEFORE: Mapping[str, Any] = {"data.max_image_bytes": 1 << 29}


def resolve(cfg: DictConfig) -> TrainConfig:
    """The composed configuration as plain objects, every `_target_` checked. Raises: UsageError."""
    _read_schedules(cfg)
    _take_what_is_present(cfg)
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
    """The values that come from the environment, by their places, as they are written.

    Of OmegaConf's resolvers (create, decode, deprecated, dict.keys, dict.values, env, select) only env asks it.
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
    """Schedules that the command line gave as texts, in whose place no breakpoint of a YAML is left."""
    for path, value in _flat(OmegaConf.to_container(cfg, resolve=False)).items():
        if isinstance(value, str) and SCHEDULE_TEXT.match(value):
            try:
                schedule = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))["value"]  # type: ignore[call-overload, index]
            except YAMLError:
                example = "{linear: {0%: 0, 20%: 0.1}}"
                raise UsageError(
                    f"{path} is {value}, whose braces or commas are amiss; expected such as {example}"
                ) from None
            OmegaConf.update(cfg, path, schedule, merge=False)


def _take_what_is_present(cfg: DictConfig) -> None:
    """Put the values of `if_present` in their places, where the part that has such a value is there.

    `size=tiny` and presets hold values for parts that an experiment may or may not have; a defaults list has no such
    condition. What the command line says goes before them.
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
    """What the command line says, its interpolations as they are written."""
    if not HydraConfig.initialized():
        return []
    written: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[assignment]
    return OverridesParser.create().parse_overrides(written)


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


def _check_durations(config: TrainConfig) -> None:
    trainer = config.trainer
    duration = Duration.parse(trainer.duration, "trainer.duration")
    if duration.unit == "%":
        raise UsageError(
            f"trainer.duration is {trainer.duration!r}, a part of itself; expected epochs, samples or steps"
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
    """Raises: UsageError for what is no number, nor a schedule of numbers, or lies out of bounds."""
    numbers = ScheduledValue(value, key, in_stages=is_whole, **bounds).values
    if is_whole and not all(isinstance(number, int) for number in numbers):
        raise UsageError(f"{key} is {value!r}; expected whole numbers")


def check_evaluate_ranges(config: EvaluateConfig) -> None:
    """Raises: UsageError for a number of an evaluation that is out of range."""
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
    """A readable name from the overrides that touch mathematics or data, with a short hash when it is long."""
    values: dict[str, str] = {}
    # Parsed, since a sweep writes values in their canonical form: one job has one name, in a sweep or alone.
    for override in _overrides():
        key, value = override.key_or_group, override.get_value_element_as_str()
        # +data.train={images: ...} adds; all else replaces.
        values[key] = f"{values[key]}+{value}" if key in values and value.startswith("{") else value
    named = {k: v for k, v in values.items() if re.fullmatch(_PLACES, k) or not _FREE.fullmatch(k)}
    parts = [f"{key}={value}" for key, value in named.items() if key not in ("experiment", "sweep")]
    # [infonce,mae] is written infonce+mae: the name is a folder's, and will be typed in shells.
    parts = [re.sub(r"[\[\]{}()'\" ]", "", part).replace(",", "+") for part in parts]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in sorted(parts)) or "default"
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def hparams(config: TrainConfig) -> dict[str, str | float | bool]:
    """What tells runs apart at a glance, under the same keys for every run, as TensorBoard's table needs it."""
    values = to_values(config)

    def shown(*place: str) -> Any:
        """The value there, or the text of what it comes from; None if there is none."""
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
    """A number as a float; what comes from the environment as it is written."""
    return value if isinstance(value, str) else float(value)


def _shown(value: Any) -> str:
    """A scheduled value in a word."""
    return f"{value:g}" if isinstance(value, int | float) else value if isinstance(value, str) else next(iter(value))


def to_values(config: TrainConfig) -> dict[str, Any]:
    """The configuration as dictionaries, lists and plain values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """`to_values` as they may be shown, the content of config.yaml: what comes from the environment stays as written.

    It may be a secret, and is none of the run's.
    """
    plain = to_values(config)
    for (*parents, key), text in config.from_environment.items():
        node: Any = plain
        for parent in parents:
            node = node[parent]
        node[key] = text
    return plain


def to_yaml(plain: Mapping[str, Any]) -> str:
    """The text of config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def read(path: Path) -> dict[str, Any]:
    """What a run's config.yaml holds, as plain values; interpolations are not followed.

    Raises: FileNotFoundError if there is none; ValueError for what no run wrote, see `from_yaml`.
    """
    return from_yaml(files.read_text(path, _MAX_YAML_BYTES), str(path))


def from_yaml(text: str, name: str = "config.yaml") -> dict[str, Any]:
    """What the text of a config.yaml holds, as plain values; interpolations are not followed.

    Raises: ValueError, with the file's `name`, if it is no YAML of keys and values, has aliases or nests too deep.
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
        raise ValueError(f"{name} has a value that is none ({error}); expected it as the run wrote it") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{name} holds no keys; expected it as the run wrote it")
    _check_plain(plain, name)
    return plain  # type: ignore[return-value]


def _check_structure(text: str, name: str) -> None:
    """Raises: ValueError for what takes a parser forever: a few lines of aliases are billions of values."""
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
    """Raises: ValueError for bytes, paths and other things that YAML knows and no run writes."""
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
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a configuration by their full names, without what may differ between a run and its resumption."""
    return {key: value for key, value in {**_BEFORE, **_flat(dict(plain))}.items() if not _FREE.fullmatch(key)}


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> list[str]:
    """What two configurations of one run differ in, as `key: saved -> now`, what may differ left out.

    Args:
        saved, now: as `to_plain` gives them.
        free: further keys that may differ.
        values: `now` as `to_values` gives it, which is what earlier versions saved.
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
