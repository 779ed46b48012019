"""Content of a run's config.yaml: conversion of the typed configuration to plain values, writing and reading."""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mmpretrain import files
from mmpretrain.config.schema import TrainConfig

_MAX_YAML_BYTES = 1 << 18
"""About 50 times the size of a config.yaml; parsing this much takes about five seconds."""
_MAX_YAML_DEPTH = 50


def to_values(config: TrainConfig) -> dict[str, Any]:
    """Convert the configuration to dictionaries, lists and plain values, as OmegaConf's `to_container` does.

    OmegaConf would validate each value anew, which takes 60 ms; a command converts its configuration several times.
    """
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        keys = [field.name for field in dataclasses.fields(value) if not field.metadata.get("omegaconf_ignore")]
        return {key: _plain(getattr(value, key)) for key in keys}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


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
