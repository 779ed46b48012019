"""Help for one configuration key: `--help KEY`."""

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mmpretrain.config import explain, resolve
from mmpretrain.config.explain import Component, Default, Entry, Yaml
from mmpretrain.errors import UsageError

_ABSENT = object()
_LISTS = ("objective", "eval", "writer")  # groups of which several options are chosen


@dataclass(frozen=True)
class _File:
    """A YAML file of the composed configuration.

    Attributes: path as it is shown; package, the key under which its content stands, empty for the root; content.
    """

    shown: str
    package: str
    content: Yaml

    def holds(self, key: str) -> bool:
        """Return True if the file gives the key, or something below it, a value."""
        inside = key.removeprefix(f"{self.package}.") if self.package else key
        if self.package and inside == key:
            return self.package == key or self.package.startswith(f"{key}.")
        return _select(self.content.values, inside) is not _ABSENT

    def comment(self, key: str) -> str:
        """Return the comment beside the key, or an empty text."""
        return self.content.comments.get(key.removeprefix(f"{self.package}.") if self.package else key, "")


def _select(values: Any, key: str) -> Any:
    """Return the value of a dotted key in nested mappings, or `_ABSENT`."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return _ABSENT
        values = values[name]
    return values


class _Composed:
    """The configuration of a command with the given overrides, and the files that it is made of.

    Args:
        command: name of the command.
        overrides: overrides of the command line, in the form that Hydra accepts.
    """

    def __init__(self, command: str, overrides: Sequence[str]) -> None:
        with initialize_config_module("mmpretrain.conf", job_name=command, version_base="1.3"):
            cfg = compose(command, list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            loader = GlobalHydra.instance().config_loader()
            chosen = loader.compute_defaults_list(command, list(overrides), RunMode.RUN).defaults
        further = [str(path) for path in cfg.hydra.searchpath]
        self._folders = [
            explain.CONF,
            *(Path(path[len("file://") :]) for path in further if path.startswith("file://")),
        ]
        self.groups: dict[str, list[str]] = {}
        """Config groups with their options."""
        for option in (file for folder in self._folders for file in sorted(folder.glob("*/*.yaml"))):
            if option.parent.name in {*map(str, cfg.hydra.runtime.choices), *map(str, cfg)}:
                self.groups.setdefault(option.parent.name, []).append(option.stem)
        self.chosen: dict[str, list[str]] = {}
        """Chosen options of each config group, without options that they include."""
        for each in chosen:
            group, _, name = str(each.config_path).partition("/")
            if not str(each.parent).startswith(f"{group}/"):
                self.chosen.setdefault(group, []).append(name)
        self.command_line = [override.lstrip("+~").partition("=")[0] for override in overrides]
        self.files = [
            _File(self._shown(path), str(each.package or ""), explain.read_yaml(path))
            for each in chosen
            if each.config_path is not None and (path := self.find(each.config_path)) is not None
        ]
        with open_dict(cfg):
            del cfg["hydra"]
        self.if_present: Any = {}
        if "if_present" in cfg:
            self.if_present = OmegaConf.to_container(cfg.if_present, resolve=False)
            resolve.take_what_is_present(cfg)
        HydraConfig.instance().cfg = None
        self.cfg: DictConfig = cfg
        self.plain: Any = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)

    def find(self, name: str) -> Path | None:
        """Return the file of a name such as `experiment/quickstart` in the search path; None for the schema."""
        paths = (folder / f"{name}.yaml" for folder in self._folders)
        return next((path for path in paths if path.is_file()), None)

    def _shown(self, path: Path) -> str:
        return f"conf/{path.relative_to(explain.CONF)}" if path.is_relative_to(explain.CONF) else str(path)

    def value(self, key: str) -> Any:
        """Return the value of a key with interpolations resolved where they can be; `_ABSENT` if there is none."""
        written = _select(self.plain, key)
        if written is _ABSENT or written == "???":
            return Default.required if written == "???" else written
        try:
            value = OmegaConf.select(self.cfg, key)
            if OmegaConf.is_config(value):
                return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
            return value.value if isinstance(value, Enum) else value
        except OmegaConfBaseException:
            return written

    def origin(self, key: str) -> tuple[str, str]:
        """Return where the value of a key comes from, and the comment beside it there."""
        if any(
            given == key or (key.startswith(f"{given}.") and given not in self.groups) for given in self.command_line
        ):
            return "the command line", ""
        for prefix in ("if_present.", ""):
            for file in reversed(self.files):
                if file.holds(prefix + key) and (not prefix or _select(self.if_present, key) is not _ABSENT):
                    is_override = not file.package and file is not self.files[0]
                    return file.shown, file.comment(prefix + key) if is_override else ""
        return "", ""


def _leaves(value: Any, path: str) -> Iterator[str]:
    """Yield the full keys of the values inside of nested mappings."""
    if isinstance(value, Mapping) and value and not set(value) <= {"cosine", "linear", "piecewise"}:  # a schedule
        for key, item in value.items():
            if key not in ("_target_", "_partial_"):
                yield from _leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path


def _targets(value: Any, path: str) -> Iterator[Component]:
    """Yield the nodes of a configuration that have a `_target_`."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield Component(path, value["_target_"], {"": dict(value)})
        for key, item in value.items():
            yield from _targets(item, f"{path}.{key}".lstrip("."))


class KeyHelp:
    """Help for the keys of a command.

    Args:
        command: name of the command.
        overrides: overrides of the command line, in the form that Hydra accepts.

    Raises: UsageError for a `_target_` that cannot be imported; errors of Hydra for invalid overrides.
    """

    def __init__(self, command: str, overrides: Sequence[str]) -> None:
        self.command = command
        self.composed = _Composed(command, overrides)
        self.entries = explain.command_entries(command)
        self._added_by: dict[str, str] = {}
        """Override that chooses a component which the configuration lacks, by the component's `_target_`."""
        plain = self.composed.plain
        known = [
            each
            for group in explain.GROUPS
            if group in plain
            for each in explain.components(group, explain.options_of(group))
        ]
        by_target = {(each.prefix, each.target): each for each in known}
        chosen = list(_targets(plain, ""))
        for component in chosen:
            # An option's own values are the defaults, not those of this configuration.
            try:
                self.entries += by_target.get((component.prefix, component.target), component).entries()
            except Exception as error:  # a user's module may raise any exception during import
                raise UsageError(
                    f"{component.prefix}._target_ is {component.target!r}, which cannot be imported "
                    f"({type(error).__name__}: {error}); expected the full name of a class or function on the Python path"
                ) from error
        targets = {(each.prefix, each.target) for each in chosen}
        for component in known:
            if (component.prefix, component.target) not in targets:
                group, option = component.prefix.partition(".")[0], next(iter(component.values))
                names = ",".join([*plain[group], option])
                self._added_by[component.target] = f"{group}=[{names}]" if group in _LISTS else f"{group}={option}"
                self.entries += component.entries()

    def text(self, key: str) -> str:
        """Return the help for a key, a prefix of keys, or a config group.

        Raises: UsageError for a key that does not exist, with the nearest ones.
        """
        key = key.removesuffix("=").strip(".")
        value = self.composed.value(key)
        inside = [leaf for leaf in self._known() if leaf.startswith(f"{key}.")]
        entry = self._entry(key)
        if key in self.composed.groups:
            return "\n".join([*self._group(key), *self._list(inside)])
        if inside and (value is _ABSENT or isinstance(value, dict)):
            absent = " (not in this configuration)" if value is _ABSENT else ""
            return "\n".join([f"{key}{absent}:{f' {entry.text}' if entry else ''}", *self._list(inside)])
        if entry is None and value is _ABSENT:
            raise UsageError(f"--help {key}: there is no such key; {self._nearest(key)}")
        return "\n".join(self._one(key, value, entry))

    def _entry(self, key: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.matches(key)), None)

    def _known(self) -> list[str]:
        """Return all full keys: those of the configuration, and those that further options would add."""
        concrete = [entry.key for entry in self.entries if "<" not in entry.key]
        return sorted({*_leaves(self.composed.plain, ""), *concrete})

    def _nearest(self, key: str) -> str:
        known = [*self._known(), *self.composed.groups]
        same_name = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
        close = list(dict.fromkeys([*same_name, *difflib.get_close_matches(key, known, n=3)]))[:4]
        last = difflib.get_close_matches(key.rpartition(".")[2], {each.rpartition(".")[2] for each in known}, n=1)
        close = close or [each for each in known if each.rpartition(".")[2] in last][:4]
        if close:
            return f"did you mean {' or '.join(close)}?"
        return f"python -m mmpretrain.{self.command} --help shows the groups and keys"

    def _one(self, key: str, value: Any, entry: Entry | None) -> Iterator[str]:
        """Yield the lines of one key."""
        yield f"{key} (not in this configuration)" if value is _ABSENT else f"{key} = {_shown(value)}"
        yield ""
        place, comment = self.composed.origin(key)
        facts = {"change": "" if "<" in key else f"{key}=VALUE"}
        if value is _ABSENT:
            facts["add with"] = self._added_by.get(entry.owner, "") if entry else ""
        if entry is None:
            parent = next((each for name in _parents(key) if (each := self._entry(name)) is not None), None)
            yield from _wrapped(f"Part of {parent.key}: {parent.text}" if parent else "No explanation.", "  ")
        else:
            yield from _wrapped(entry.text, "  ")
            is_scheduled = entry.kind.startswith("Scheduled")
            facts = {
                "type": entry.kind,
                "values": _allowed(entry.kind),
                "schedule": "such as {linear: {0%: 0, 20%: 0.1}}; also piecewise, cosine" if is_scheduled else "",
                "default": _default(entry, key),
                **facts,
            }
            place = place or f"the default of {entry.owner}"
            comment = "" if comment[:20].lower() in entry.text.lower() else comment
        if value is not _ABSENT and value is not Default.required:
            facts["set by"] = f"{place}{f' ({comment})' if comment else ''}"
        yield ""
        for name, fact in facts.items():
            yield from _wrapped(fact, f"  {name:<9} ", " " * 12)

    def _group(self, group: str) -> Iterator[str]:
        """Yield the lines of a config group: what is chosen, and the options with their purposes."""
        entry = self._entry(group)
        choice = f"{group}=[NAME,NAME]" if group in _LISTS else f"{group}=NAME"
        yield f"{group}:{f' {entry.text}' if entry else ''} Choose with {choice}."
        yield ""
        chosen = self.composed.chosen.get(group, [])
        yield f"  chosen    {_shown(chosen if group in _LISTS else next(iter(chosen), None))}"
        yield ""
        options = self.composed.groups[group]
        width = max(map(len, options))
        for option in options:
            path = self.composed.find(f"{group}/{option}")
            purpose = explain.read_yaml(path).purpose if path is not None else ""
            yield from _wrapped(purpose or "-", f"  {option:<{width}}  ", " " * (width + 4))

    def _list(self, inside: Sequence[str]) -> Iterator[str]:
        """Yield two lines for each key below a prefix: its value and its meaning."""
        is_absent = all(self.composed.value(leaf) is _ABSENT for leaf in inside)
        for leaf in inside:
            value, entry = self.composed.value(leaf), self._entry(leaf)
            if value is _ABSENT and not is_absent:
                continue
            shown = _default(entry, leaf) if value is _ABSENT and entry is not None else _shown(value)
            yield ""
            yield f"  {leaf} = {shown}"
            if entry is not None:
                yield from _wrapped(entry.text, "      ")


def _parents(key: str) -> list[str]:
    """Return the keys that contain a key, the nearest first."""
    names = key.split(".")
    return [".".join(names[:end]) for end in range(len(names) - 1, 0, -1)]


def _shown(value: Any) -> str:
    return value.value if isinstance(value, Default) else explain.flow(value)


def _default(entry: Entry, key: str) -> str:
    """Return the default of a key: its stream's or data set's, or that of each option."""
    shown = {option: _shown(value) for option, value in entry.defaults.items()}
    named = next((text for option, text in shown.items() if f".{option}." in key and not entry.is_argument), None)
    first = named or next(iter(shown.values()))
    others = {} if named else {option: text for option, text in shown.items() if text != first}
    return first + "".join(f"; {option}: {text}" for option, text in others.items())


def _allowed(kind: str) -> str:
    """Return the values of an enumeration or a Literal, or an empty text."""
    if literal := re.search(r"Literal\[(.*?)\]", kind):
        return literal[1].replace("'", "")
    is_names = re.fullmatch(r"[a-z]\w*( \| [a-z]\w*)+", kind) and not re.search(r"\b(int|float|str|bool|dict)\b", kind)
    return kind.replace(" | ", ", ") if is_names else ""


def _wrapped(text: str, first: str, following: str | None = None) -> list[str]:
    """Return the lines of a text, none for an empty one."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    rest = first if following is None else following
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
