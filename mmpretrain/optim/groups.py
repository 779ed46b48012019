"""Parameter groups of an optimiser: by tower, weight decay, layer and name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmpretrain.errors import check_number, nearest

TOWERS = ("image", "text", "heads")
GROUP_KEYS = ("params", "names", "tower", "lr", "base_lr", "weight_decay")
"""Keys of a parameter group that the configuration and the schedule determine."""

_OF_A_TOWER = ("lr", "weight_decay", "layer_decay")
_OF_A_PATTERN = ("match", "lr", "lr_factor", "weight_decay")

Towers = Mapping[str, Mapping[str, float | None]]
"""Overrides of `lr` and `weight_decay`, and `layer_decay`, by tower."""
Patterns = Sequence[Mapping[str, Any]]
"""Overrides by name of a parameter, each {match, lr, lr_factor, weight_decay}."""
Layers = Callable[[str], Mapping[str, int]]
"""Function from `image` or `text` to the number of layers above each of its parameters (`models.layers.layers_above`)."""


def tower_of(parameter_name: str) -> str:
    """Return the tower of a parameter: `image`, `text`, or `heads` for projections and parameters of objectives."""
    for tower in ("image", "text"):
        if parameter_name.startswith(f"model.{tower}."):
            return tower
    return "heads"


def _decays(parameter: nn.Parameter) -> bool:
    """Return True if weight decay acts on the parameter: it has at least two dimensions larger than 1.

    Biases, norms, scales and single tokens have at most one, and do not decay.
    """
    return sum(size > 1 for size in parameter.shape) > 1


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    towers: Towers,
    groups: Patterns = (),
    layers: Layers | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimiser, each with one learning rate and one weight decay.

    There is a group with and one without weight decay per tower, layer of a tower with `layer_decay`, and pattern.
    A parameter with l layers above it (0 in the head, L + 1 in the stem of a tower of L blocks) has the learning rate

        lr_l = lr * layer_decay ** l        (BEiT, Bao et al. 2021)

    Args:
        parameters: (name in the task, parameter); frozen parameters are omitted.
        lr: learning rate.
        weight_decay: weight decay; it does not act on one-dimensional parameters.
        towers: overrides of `lr` and `weight_decay` for `image`, `text` or `heads`, and `layer_decay` of `image` and
            `text`; None: the value above, and no layer-wise decay.
        groups: overrides for the parameters whose names match the glob pattern `match`; the first match counts. `lr`
            replaces the learning rate with its layer-wise decay, `lr_factor` multiplies it, and `weight_decay` replaces the
            weight decay.
        layers: number of layers above each parameter of a tower; needed for `layer_decay` alone.

    Raises: ValueError if `towers` or `groups` has an unknown key, a number is out of range, a pattern matches no parameter,
        or a tower with `layer_decay` does not tell its layers.
    """
    check_number("optimizer.lr", lr, at_least=0)
    check_number("optimizer.weight_decay", weight_decay, at_least=0)
    _check_towers(towers)
    named = list(parameters)
    pattern_of = _first_matches(named, groups)
    above: dict[str, int] = {}
    for tower, own in towers.items():
        if own.get("layer_decay") is not None and any(tower_of(name) == tower for name, _ in named):
            if layers is None:
                raise ValueError(
                    f"optimizer.towers.{tower}.layer_decay is {own['layer_decay']}, but the optimizer's function passes no "
                    "`layers` to parameter_groups; expected an argument `layers` that it passes on"
                )
            above |= layers(tower)
    members: dict[tuple[str, bool, int | None, int | None], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            key = (tower_of(name), _decays(parameter), above.get(name), pattern_of.get(name))
            members.setdefault(key, []).append((name, parameter))
    found = []
    for (tower, decays, num_above, pattern), each in members.items():
        own_lr, own_decay, layer_decay = (towers.get(tower, {}).get(argument) for argument in _OF_A_TOWER)
        of_pattern = {} if pattern is None else groups[pattern]
        group_lr = lr if own_lr is None else own_lr
        if num_above is not None and layer_decay is not None:
            group_lr *= layer_decay**num_above
        if of_pattern.get("lr") is not None:
            group_lr = of_pattern["lr"]
        if of_pattern.get("lr_factor") is not None:
            group_lr *= of_pattern["lr_factor"]
        decay = weight_decay if own_decay is None else own_decay
        if of_pattern.get("weight_decay") is not None:
            decay = of_pattern["weight_decay"]
        found.append(
            {
                "params": [parameter for _, parameter in each],
                "names": [name for name, _ in each],
                "tower": tower,
                "lr": group_lr,
                "base_lr": group_lr,
                "weight_decay": decay if decays else 0.0,
            }
        )
    return found


def _check_towers(towers: Towers) -> None:
    if unknown := sorted(set(towers) - set(TOWERS)):
        raise ValueError(f"optimizer.towers has {unknown[0]!r}; expected one of {', '.join(TOWERS)}")
    for tower, own in towers.items():
        known = _OF_A_TOWER[:2] if tower == "heads" else _OF_A_TOWER
        if unknown := sorted(set(own) - set(known)):
            raise ValueError(f"optimizer.towers.{tower} has {unknown[0]!r}; expected {' or '.join(known)}")
        for argument, value in own.items():
            if value is not None:
                bounds = {"above": 0, "at_most": 1} if argument == "layer_decay" else {"at_least": 0}
                check_number(f"optimizer.towers.{tower}.{argument}", value, **bounds)


def _first_matches(named: Sequence[tuple[str, nn.Parameter]], groups: Patterns) -> dict[str, int]:
    """Return the index of the first pattern that matches each parameter. Raises: ValueError (see `parameter_groups`)."""
    found: dict[str, int] = {}
    for i, group in enumerate(groups):
        key = f"optimizer.groups[{i}]"
        if unknown := sorted(set(group) - set(_OF_A_PATTERN)):
            raise ValueError(f"{key} has {unknown[0]!r}; {nearest(unknown[0], _OF_A_PATTERN)}")
        pattern = group.get("match")
        if not isinstance(pattern, str):
            raise ValueError(
                f"{key}.match is {pattern!r}; expected a glob pattern of parameter names, such as '*.bias'"
            )
        for argument in _OF_A_PATTERN[1:]:
            if (value := group.get(argument)) is not None:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{key}.{argument} is {value!r}; expected a number")
                check_number(f"{key}.{argument}", value, at_least=0)
        if group.get("lr") is not None and group.get("lr_factor") is not None:
            raise ValueError(f"{key} has lr and lr_factor; expected one of them: lr replaces, lr_factor multiplies")
        matched = {name: parameter for name, parameter in named if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(f"{key}.match is {pattern!r}, which matches no parameter; {_near(pattern, named)}")
        if not set(matched) - set(found):
            raise ValueError(f"{key}.match is {pattern!r}, whose parameters all match patterns before it; put it first")
        if group.get("weight_decay") and not any(map(_decays, matched.values())):
            raise ValueError(
                f"{key}.weight_decay is {group['weight_decay']}, but {pattern!r} matches only biases, norms and scales, "
                "which do not decay; expected a pattern that matches matrices"
            )
        found = {**dict.fromkeys(matched, i), **found}
    return found


def _near(pattern: str, named: Sequence[tuple[str, nn.Parameter]]) -> str:
    """Suggest names that resemble a pattern: those that have most of its words."""
    words = [word for word in pattern.replace("*", ".").split(".") if word]
    known = [name for name, _ in named]
    shares = {name: sum(any(word in part for part in name.split(".")) for word in words) for name in known}
    best = max(shares.values(), default=0)
    if best == 0:
        close = nearest(pattern.replace("*", ""), known) if known else ""
        return close if close.startswith("did you mean") else f"expected such as {', '.join(known[:3])}"
    return f"near names: {', '.join([name for name in known if shares[name] == best][:3])}"
