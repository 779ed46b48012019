"""Resolution of the composed configuration to the typed one of schema.py."""

import os
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc
from yaml import YAMLError

from mmpretrain.config.checks import check_known, check_parts, check_ranges
from mmpretrain.config.config_yaml import to_plain
from mmpretrain.config.identity import derived_name, flat
from mmpretrain.config.schema import TrainConfig
from mmpretrain.data.remote import check_address, is_remote
from mmpretrain.errors import UsageError
from mmpretrain.schedules import SCHEDULE_TEXT


def resolve(cfg: DictConfig) -> TrainConfig:
    """Convert the composed configuration to plain objects and check it, including every `_target_`. Raises: UsageError."""
    _read_schedules(cfg)
    take_what_is_present(cfg)
    config: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    check_known(config)
    config.from_environment = _from_environment(cfg)
    _check_addresses(config)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UsageError(f"{missing[0]} has no value; give it one: {missing[0]}=...")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    experiment = choices.get("experiment") or "train"
    config.run.name = config.run.name or derived_name(_overrides())
    config.run.dir = config.run.dir or os.path.join("runs", str(experiment), config.run.name)
    check_ranges(config)
    check_parts(config)
    return config


def _check_addresses(config: TrainConfig) -> None:
    """Raises: UsageError for an address that holds credentials, which config.yaml and the run's name would show."""
    for key, value in flat(to_plain(config)).items():
        for address in value if isinstance(value, list) else [value]:
            if isinstance(address, str) and is_remote(address):
                try:
                    check_address(address, key)
                except ValueError as error:
                    raise UsageError(str(error)) from error


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
    for path, value in flat(OmegaConf.to_container(cfg, resolve=False)).items():
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
        given |= {f"{key}.{leaf}" for leaf in flat(value)} if isinstance(value, dict) and value else {key}
    for path, value in flat(OmegaConf.to_container(cfg.if_present, resolve=False)).items():
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
