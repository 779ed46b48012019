"""Instantiation of `_target_` nodes after a check against their callables' signatures. There is no other registry."""

import functools
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mmpretrain.errors import UsageError, nearest
from mmpretrain.seeds import torch_seed

Node = dict[str, Any]
"""A `_target_` with its arguments, as a dictionary."""


def accepts(value: Any, annotation: Any) -> bool:
    """Return True if a plain value fits a parameter's annotation. Annotations of other types accept every value."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is None:
        return value is None
    if isinstance(value, dict) and "_target_" in value:
        return True
    if origin in (Union, UnionType):
        return any(accepts(value, option) for option in options)
    if origin is Literal:
        return value in options
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    if kind in (Any, inspect.Parameter.empty) or not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in [option.value for option in kind]
    if issubclass(kind, Mapping):
        items = value.values() if isinstance(value, Mapping) else [None]
        return isinstance(value, Mapping) and (not options or all(accepts(item, options[1]) for item in items))
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and options and Ellipsis not in options:
            return len(value) == len(options) and all(map(accepts, value, options))
        return not options or all(accepts(item, options[0]) for item in value)
    return isinstance(value, kind)


def expected_type(annotation: Any) -> str:
    """Describe an annotation for an error message."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(option.value for option in annotation)
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def check_targets(node: Any, path: str, runtime: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
    """Check every `_target_` below a node against its callable's signature.

    Args:
        node: resolved part of the configuration.
        path: full name of the node, for error messages.
        runtime: parameters of the outermost target that are passed when it is built.
        beside: keys of the outermost node that are not arguments.

    Raises: UsageError for a target that cannot be imported, and for an unknown, missing or ill-typed argument.
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


def find(name: str) -> Any:
    """Return the object of a dotted name. Raises: any exception that its module raises during import."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):  # `module` may be a class in a module
            return pkgutil.resolve_name(name)
        raise


def _check_target(node: Node, path: str, runtime: Sequence[str], beside: Sequence[str]) -> None:
    try:
        target = find(node["_target_"])
    except Exception as error:  # a user's module may raise any exception during import
        raise UsageError(
            f"{path}._target_ is {node['_target_']!r}, which cannot be imported ({type(error).__name__}: {error}); "
            "expected the full name of a class or function on the Python path"
        ) from error
    try:
        signature = inspect.signature(target, eval_str=True)
    except NameError:  # an annotation that can only be resolved by type checkers
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
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{path}.{name} is {value}; expected a finite number: {path}.{name}=...")
        if not accepts(value, annotation):
            raise UsageError(f"{path}.{name} is {value!r}; expected {expected_type(annotation)}: {path}.{name}=...")
    is_partial = node.get("_partial_") and not runtime
    for name, parameter in parameters.items():
        if name not in node and parameter.default is inspect.Parameter.empty and not is_partial:
            raise UsageError(
                f"{path}.{name} is missing; expected {expected_type(parameter.annotation)}: {path}.{name}=..."
            )


Lookup = Callable[[Any, str], Any]
"""Function from (value of a `_target_`, full name of its node) to the callable; it raises an error for a refused one."""


@dataclass(frozen=True)
class _Call:
    """Resolved `_target_` node: callable, arguments and full name."""

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    is_partial: bool
    path: str


def instantiate(node: Any, seed: int, path: str, **runtime: Any) -> Any:
    """Build the object of a node from a trusted configuration, as `call(resolve(node, path, find), seed)`.

    Args:
        node: checked part of the configuration.
        seed: seed of the run.
        path: full name of the node.
        runtime: further arguments of the outermost target.

    Raises: UsageError for a ValueError of a target, with the node's name; other exceptions of a target are passed on.
    """
    return call(resolve(node, path, lambda name, _: find(name)), seed, **runtime)


def resolve(node: Any, path: str, lookup: Lookup) -> Any:
    """Look up every `_target_` of a node, at any depth of nested containers, without calling any.

    `call` accepts only the result of this function, so that `lookup` alone decides which callables are allowed.

    Args:
        node: part of a configuration.
        path: full name of the node.
        lookup: function that returns the callable of a `_target_`, or raises an error.
    """
    if isinstance(node, list | tuple):
        return [resolve(item, f"{path}[{i}]", lookup) for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {key: resolve(value, f"{path}.{key}", lookup) for key, value in node.items()}
    if "_target_" not in values:
        return values
    arguments = {key: value for key, value in values.items() if key not in ("_target_", "_partial_")}
    return _Call(lookup(node["_target_"], path), arguments, bool(node.get("_partial_")), path)


def call(resolved: Any, seed: int, **runtime: Any) -> Any:
    """Build the objects of a resolved node, innermost first.

    Each object is built with torch's generators seeded from (seed, path of the node), so that adding one part to an
    experiment does not change the initial weights of other parts. See `instantiate` for arguments and errors.
    """
    if isinstance(resolved, list):
        return [call(item, seed) for item in resolved]
    if isinstance(resolved, dict):
        return {key: call(value, seed) for key, value in resolved.items()}
    if not isinstance(resolved, _Call):
        return resolved
    arguments = {key: call(value, seed) for key, value in resolved.arguments.items()}
    if resolved.is_partial:
        return functools.partial(resolved.target, **arguments, **runtime)
    with torch_seed(seed, resolved.path):
        try:
            return resolved.target(**arguments, **runtime)
        except ValueError as error:
            # The target does not know its key in the configuration, so add it to the message.
            raise error if resolved.path in str(error) else UsageError(f"{resolved.path}: {error}") from error
