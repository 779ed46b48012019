"""Explanations of configuration keys, for `--help KEY` and docs/generate.py.

A key is explained where it is defined: in a comment of conf/, in the docstring below a field of the schema, or in the Args of
the class that a `_target_` names.
"""

import ast
import importlib.resources
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mmpretrain.config import schema
from mmpretrain.config.instantiate import find

CONF = Path(str(importlib.resources.files("mmpretrain.conf")))
COMMANDS = {
    "train": "TrainConfig",
    "evaluate": "EvaluateConfig",
    "export": "ExportConfig",
    "embed": "EmbedConfig",
    "interpolate": "InterpolateConfig",
    "demo": "DemoConfig",
}
GROUPS = (
    "objective",
    "model",
    "eval",
    "optimizer",
    "schedule",
    "writer",
)  # groups whose options name a class or function
# Arguments that the code gives, never the configuration.
_FROM_CODE = ("self", "model", "parameters", "layers", "classes", "config_path", "folder", "step", "samples", "root")
_OUTSIDE = {"weight": "Scheduled", "every": "str | None"}  # keys beside a class's arguments, with their types


class Default(Enum):
    """Defaults that are not values."""

    required = "required"
    below = "below"  # the keys inside of it are entries of their own


@dataclass(frozen=True)
class Entry:
    """A configuration key and its explanation.

    Names that a configuration chooses stand in angle brackets, such as `data.train.<stream>.shards`.
    """

    key: str
    kind: str
    """Type as it is written in the code, with null for None."""
    defaults: Mapping[str, Any]
    """Default of each option, stream or data set that has the key; a value or a `Default`."""
    text: str
    owner: str
    """Class or function that defines the key."""
    is_argument: bool = False
    """True for an argument of a `_target_`. The first default is then that of the option of the same name."""

    def matches(self, key: str) -> bool:
        """Return True for a key with names in place of those in angle brackets."""
        return re.fullmatch(re.sub(r"<\w+>", "[^.]+", re.escape(self.key)), key) is not None


@dataclass
class Yaml:
    """A file of conf/: its values, its comments by dotted key, and the comment lines at its top."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    header: list[str] = field(default_factory=list)

    @property
    def purpose(self) -> str:
        """The comment at the top without its commands, which are indented."""
        return " ".join(line for line in self.header if not line.startswith("  "))


def read_yaml(path: Path) -> Yaml:
    """Read a file and the comments behind its keys. A comment continues on the lines below it, in the same column."""
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), Yaml(yaml.safe_load(text) or {})
    header = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    found.header = [line[2:] for line in header if not line.startswith("# @package")]

    def walk(node: yaml.Node, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            own = f"{path}.{key.value}".lstrip(".")
            end = value.end_mark if value.end_mark.line == key.start_mark.line else key.end_mark
            if comment := re.match(r":?\s*(?:[&*]\w+)?\s*# ?(.*)", lines[end.line][end.column :]):
                words, column, below = [comment[1]], lines[end.line].index("#", end.column), end.line + 1
                while below < len(lines) and lines[below].strip()[:1] == "#" and lines[below].index("#") == column:
                    words.append(lines[below].strip("# "))
                    below += 1
                found.comments[own] = " ".join(words)
            walk(value, own)

    if (root := yaml.compose(text)) is not None:
        walk(root, "")
    return found


def package_of(path: Path, group: str) -> str:
    """Return the dotted key under which the content of a file of a group stands in the configuration; empty for the root."""
    header = re.match(r"# @package (\S+)", path.read_text(encoding="utf-8"))
    return group if header is None else "" if header[1] == "_global_" else header[1]


def read_option(group: str, name: str) -> Yaml:
    """Read an option of a group, with the options of the same group that its defaults list names."""
    path = CONF / group / f"{name}.yaml"
    own, option = read_yaml(path), Yaml()
    parents = [parent for parent in own.values.pop("defaults", []) if isinstance(parent, str) and parent != "_self_"]
    for parent in (read_option(group, parent) for parent in parents):
        option = Yaml(_merged(option.values, parent.values), {**option.comments, **parent.comments})
    if package_of(path, group) == "":
        own.values = own.values[group]
        own.comments = {key.removeprefix(f"{group}."): text for key, text in own.comments.items()}
    return Yaml(_merged(option.values, own.values), {**option.comments, **own.comments}, own.header)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values of `above` take precedence."""
    both = dict(below)
    for key, value in above.items():
        both[key] = _merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def flow(value: Any) -> str:
    """Return a value as YAML writes it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def _sentence(text: str) -> str:
    """Return an explanation as a sentence in the words of YAML: null for None, a capital letter and a full stop."""
    text = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    if re.match(r"[a-z]+([ ,;:.]|$)", text):  # not a name such as open_clip
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."


def _is_target(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _arguments_of(target: Any) -> tuple[dict[str, tuple[str, Any]], dict[str, str]]:
    """Return (name -> (annotation as written, default), name -> description in the docstring's Args).

    A class that inherits its arguments has the descriptions of its bases for those that it does not describe.
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError):  # no source in Python, such as a built-in function
        return {}, {}
    assert isinstance(tree, ast.FunctionDef)
    found: dict[str, tuple[str, Any]] = {}
    for each in [*tree.args.args, *tree.args.kwonlyargs]:
        default = inspect.signature(function).parameters[each.arg].default
        annotation = ast.unparse(each.annotation) if each.annotation else ""
        if each.arg not in _FROM_CODE:
            found[each.arg] = annotation, Default.required if default is inspect.Parameter.empty else default
    texts: dict[str, str] = {}
    for described in reversed(inspect.getmro(target)) if inspect.isclass(target) else [target]:
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(described) or "", flags=re.MULTILINE)
        for entry in re.findall(r"^    (\S.*?(?:\n {8}.*)*)$", section[1] if section else "", flags=re.MULTILINE):
            names, _, text = entry.partition(":")
            texts |= {name.strip(): text for name in names.split(",")}
    return found, texts


@dataclass
class Component:
    """A `_target_` with the values that each option gives its arguments.

    Args:
        prefix: full key of the node.
        target: full name of the class or function.
        values: arguments by option.
        comments: comments of conf/ by argument.
    """

    prefix: str
    target: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    def entries(self) -> Iterator[Entry]:
        """Yield the arguments. The docstring explains an argument; a comment does if that does not."""
        found, texts = _arguments_of(find(self.target))
        given = [key for values in self.values.values() for key in values if not key.startswith("_")]
        for key in dict.fromkeys([*(key for key in given if key not in found), *found]):
            kind, default = found.get(key, (_OUTSIDE.get(key, ""), Default.required))
            values = {option: values.get(key, default) for option, values in self.values.items()}
            values = {option: Default.below if _is_target(value) else value for option, value in values.items()}
            text = _sentence(texts.get(key) or self.comments.get(key) or "")
            yield Entry(
                f"{self.prefix}.{key}", kind.replace("None", "null"), values, text, self.target, is_argument=True
            )


def below(comments: Mapping[str, str], path: str) -> dict[str, str]:
    """Return the comments of the keys below a path, by the rest of the key."""
    return {key.removeprefix(path): text for key, text in comments.items() if key.startswith(path)}


def options_of(group: str) -> dict[str, Yaml]:
    """Return the options of a group by name."""
    return {path.stem: read_option(group, path.stem) for path in sorted((CONF / group).glob("*.yaml"))}


def components(group: str, options: Mapping[str, Yaml]) -> list[Component]:
    """Return the classes and functions that the options of a group name."""
    found: dict[tuple[str, str], Component] = {}

    def add(option: str, prefix: str, values: dict[str, Any], comments: dict[str, str]) -> None:
        if _is_target(values):
            component = found.setdefault((prefix, values["_target_"]), Component(prefix, values["_target_"]))
            component.values[option] = values
            component.comments |= comments
        for key, value in values.items():
            if isinstance(value, dict) and (_is_target(value) or prefix == group):
                add(option, f"{prefix}.{key}", value, below(comments, f"{key}."))

    # The option that has a component's own name comes first: its values are the defaults.
    for name in sorted(options, key=lambda name: (name not in options[name].values, name)):
        add(name, group, options[name].values, options[name].comments)
    return list(found.values())


def _fields_of(kind: type) -> Iterator[tuple[str, str, Any, str]]:
    """Yield (name, annotation as written, default, the docstring below it) of a dataclass's fields, inherited ones last."""
    known = {each.name: each for each in fields(kind) if not each.metadata.get("omegaconf_ignore")}
    for base in filter(is_dataclass, kind.__mro__):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in known:
                own = known[node.target.id]
                default = own.default_factory() if callable(own.default_factory) else own.default
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                yield own.name, ast.unparse(node.annotation), getattr(default, "value", default), str(text)


def schema_entries(kind: type, key: str, given: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[Entry]:
    """Yield the keys of a dataclass of the schema.

    Args:
        kind: the dataclass.
        key: its full key; empty for the root.
        given: values of conf/ by name of the stream or data set.
        comments: comments of conf/ by full key.
    """
    hints = get_type_hints(kind)
    for name, annotation, own_default, docstring in _fields_of(kind):
        path = f"{key}.{name}".lstrip(".")
        values = {where: value.get(name, own_default) for where, value in given.items()}
        values = {where: Default.required if value == "???" else value for where, value in values.items()}
        type_name = re.sub(r"^dict\[str, (\w+)\]$", r"\1", annotation).split(" ")[0]
        named = getattr(schema, type_name, None) or hints[name]
        if is_dataclass(named) and type_name == annotation:
            inside = {where: value if isinstance(value, dict) else {} for where, value in values.items()}
            yield from schema_entries(named, path, inside, comments)  # type: ignore[arg-type]
            continue
        if inspect.isclass(named) and issubclass(named, Enum):
            annotation = annotation.replace(type_name, " | ".join(each.value for each in named))
        has_entries = {w: _is_target(value) or (is_dataclass(named) and bool(value)) for w, value in values.items()}
        shown = {where: Default.below if has_entries[where] else value for where, value in values.items()}
        text = _sentence(comments.get(path) or docstring)
        yield Entry(path, annotation.replace("None", "null"), shown, text, kind.__name__)
        if is_dataclass(named):
            members = {where: each for value in values.values() for where, each in value.items()} or {"": {}}
            inside_path = f"{path}.{'<stream>' if name == 'train' else '<name>'}"
            yield from schema_entries(named, inside_path, members, comments)  # type: ignore[arg-type]
        for target in [value for value in values.values() if _is_target(value)][:1]:
            yield from Component(path, target["_target_"], {"": target}, below(comments, f"{path}.")).entries()


def command_entries(command: str) -> list[Entry]:
    """Return the keys of a command, without those that the options of `GROUPS` have."""
    found = read_yaml(CONF / f"{command}.yaml")
    for group, option in (("data", "pairs"), ("parallel", "ddp")) if command == "train" else ():
        part = read_option(group, option)
        found.values[group] = part.values
        found.comments |= {f"{group}.{key}": text for key, text in part.comments.items()}
    # The comments beside the stream and the data set that conf/ has are those of any.
    for own, generic in (("data.train.pairs.", "data.train.<stream>."), ("data.val.val.", "data.val.<name>.")):
        found.comments |= {generic + key: text for key, text in below(found.comments, own).items()}
    return list(schema_entries(getattr(schema, COMMANDS[command]), "", {"": found.values}, found.comments))
