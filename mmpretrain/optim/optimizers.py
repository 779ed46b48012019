"""Optimisers: AdamW, Muon, and those of torch, timm and other libraries by name."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import timm.optim
import torch
from timm.optim.kron import Kron
from torch import nn

from mmpretrain.errors import check_number, nearest
from mmpretrain.optim.groups import Layers, parameter_groups

_UNSUITABLE: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "computes the loss again",
    torch.optim.SparseAdam: "needs sparse gradients",
    torch.optim.Muon: "trains matrices alone (optimizer=muon trains the other parameters by AdamW)",
    timm.optim.Adahessian: "needs a second backward pass",
    Kron: "has state that cannot be checkpointed",
    timm.optim.Lookahead: "wraps another optimiser",
}
"""Optimisers that training cannot use, with the reason."""


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    towers: Mapping[str, Mapping[str, float | None]],
    groups: Sequence[Mapping[str, Any]] = (),
    layers: Layers | None = None,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with fused kernels.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above. `layer_decay` of `image` or `text` multiplies the learning rate once for
            each layer above a parameter; null: 1.
        groups: overrides by name of a parameter, such as `[{match: "*.pos_embed", lr_factor: 0.1, weight_decay: 0}]`;
            see `parameter_groups`.
        betas: decay rates of the first and second moments.
        eps: added to the denominator.
        layers: see `parameter_groups`.

    Raises: ValueError if a number is out of range, and in the cases of `parameter_groups`.
    """
    check_number("optimizer.eps", eps, at_least=0)
    _check_betas(betas)
    found = parameter_groups(parameters, lr, weight_decay, towers, groups, layers)
    return torch.optim.AdamW(found, lr=lr, betas=betas, eps=eps, fused=True)


def _check_betas(betas: tuple[float, float]) -> None:
    for i, beta in enumerate(betas):
        check_number(f"optimizer.betas[{i}]", beta, at_least=0, below=1)


def optimizer_by_name(
    parameters: Iterable[tuple[str, nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
    args: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[str, Any]] = (),
    layers: Layers | None = None,
) -> torch.optim.Optimizer:
    """Build an optimiser of torch, timm or any other library by its name.

    Args:
        parameters: see `parameter_groups`.
        name: a class of `torch.optim` (`SGD`, `NAdam`), an entry of `timm.optim.list_optimizers()` (`lion`, `lamb`), or the
            full name of a subclass of `torch.optim.Optimizer` (`schedulefree.AdamWScheduleFree`).
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above. `layer_decay` of `image` or `text` multiplies the learning rate once for
            each layer above a parameter; null: 1.
        args: further arguments of the optimiser.
        groups: overrides by name of a parameter, such as `[{match: "*.pos_embed", lr_factor: 0.1, weight_decay: 0}]`;
            see `parameter_groups`.
        layers: see `parameter_groups`.

    Raises: ValueError if there is no such optimiser, it is not supported or it rejects an argument, and in the cases of
        `parameter_groups`.
    """
    kind = _kind(name)
    found = parameter_groups(parameters, lr, weight_decay, towers, groups, layers)
    try:
        optimizer = kind(found, lr=lr, **(args or {}))
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise ValueError(f"optimizer.name={name} refuses optimizer.args {dict(args or {})}: {error}") from error
    if "." in name and "weight_decay" not in optimizer.defaults and any(group["weight_decay"] for group in found):
        raise ValueError(
            f"optimizer.weight_decay is {weight_decay}, but {name} has none; expected optimizer.weight_decay=0"
        )
    return optimizer


# Names that the configurations of runs have as `_target_`.
torch_optimizer = timm_optimizer = optimizer_by_name


def _kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimiser, or a function that makes one. Raises: ValueError."""
    if "." in name:
        try:
            kind = pkgutil.resolve_name(name)
        except Exception as error:  # a library may raise any exception during import
            raise ValueError(
                f"optimizer.name is {name!r}, which cannot be imported ({type(error).__name__}: {error}); expected the full "
                "name of a class on the Python path, such as schedulefree.AdamWScheduleFree: install its library"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"optimizer.name is {name!r}; expected a subclass of torch.optim.Optimizer")
        if (reason := next((text for base, text in _UNSUITABLE.items() if issubclass(kind, base)), None)) is not None:
            raise ValueError(
                f"optimizer.name is {name!r}, which {reason}; expected another one, such as torch.optim.NAdam"
            )
        return kind
    kinds = {key: kind for key, kind in vars(torch.optim).items() if isinstance(kind, type)}
    kinds = {key: kind for key, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    for unsuitable in ("Optimizer", *(kind.__name__ for kind in _UNSUITABLE)):
        kinds.pop(unsuitable, None)
    if name in kinds:
        return kinds[name]
    of_timm = [
        str(each)
        for each in timm.optim.list_optimizers()
        if not str(each).startswith(
            tuple(kind.__name__.lower() for kind in _UNSUITABLE if kind.__module__[:4] == "timm")
        )
    ]
    if name not in of_timm:
        raise ValueError(f"optimizer.name is {name!r}; {nearest(name, [*kinds, *of_timm])}")
    return timm.optim.get_optimizer_class(name, bind_defaults=True)


def muon(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
    momentum: float = 0.95,
    nesterov: bool = True,
    adamw_lr_factor: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    args: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[str, Any]] = (),
    layers: Layers | None = None,
) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the matrices inside the towers' blocks, AdamW for all other parameters, by timm.

    With G the gradient of a matrix W [m, n], and U V^T of the singular value decomposition M = U S V^T approximated by
    Newton-Schulz iterations,

        M <- momentum M + (1 - momentum) G
        W <- W - lr (0.2 sqrt(max(m, n)) U V^T + weight_decay W)

    Updates have the size of AdamW's, so that both take one learning rate (Liu et al. 2025). AdamW trains embeddings,
    positions, projections, parameters of objectives, norms and biases.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above. `layer_decay` of `image` or `text` multiplies the learning rate once for
            each layer above a parameter; null: 1.
        momentum: decay rate of Muon's momentum.
        nesterov: orthogonalise momentum M + (1 - momentum) G instead of M.
        adamw_lr_factor: learning rate of AdamW's parameters, relative to `lr`.
        betas: decay rates of AdamW's moments.
        eps: added to AdamW's denominator.
        args: further arguments of `timm.optim.Muon`, such as `{ns_steps: 5, adjust_lr_fn: original}`.
        groups: overrides by name of a parameter, such as `[{match: "*.pos_embed", lr_factor: 0.1, weight_decay: 0}]`;
            see `parameter_groups`.
        layers: see `parameter_groups`; it tells which matrices lie inside the towers' blocks.

    Raises: ValueError if timm rejects an argument, a tower does not tell its layers, and in the cases of `parameter_groups`.
    """
    check_number("optimizer.momentum", momentum, at_least=0, below=1)
    check_number("optimizer.adamw_lr_factor", adamw_lr_factor, at_least=0)
    check_number("optimizer.eps", eps, at_least=0)
    _check_betas(betas)
    if layers is None:
        raise ValueError("optimizer muon needs `layers`, which training gives; expected mmpretrain.models.layers")
    hidden = set()
    found = parameter_groups(parameters, lr, weight_decay, towers, groups, layers)
    for tower in {group["tower"] for group in found} - {"heads"}:
        above = layers(tower)
        hidden |= {name for name, number in above.items() if 0 < number < max(above.values())}
    # Each part says who trains it: otherwise timm would decide by shape, with Muon's options for AdamW's parameters.
    of_muon, of_adamw = {"use_muon": True}, {"use_muon": False, "nesterov": False, "eps": eps}
    parts = []
    for group in found:
        is_hidden = [
            name in hidden and _is_matrix(parameter)
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        rates = {key: group[key] * adamw_lr_factor for key in ("lr", "base_lr")}
        parts += _selected({**group, **of_muon}, is_hidden)
        parts += _selected({**group, **rates, **of_adamw}, [not each for each in is_hidden])
    options = {"momentum": momentum, "nesterov": nesterov, "betas": betas, **(args or {})}
    try:
        return timm.optim.Muon(parts, lr=lr, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer muon refuses optimizer.args {dict(args or {})}: {error}") from error


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return True for matrices and convolutions that mix channels, which Muon flattens to [out, in * height * width]."""
    return parameter.ndim > 1 and min(parameter.shape[:2]) > 1


def _selected(group: dict[str, Any], is_member: list[bool]) -> list[dict[str, Any]]:
    """Return the part of a group that has the selected members, in a list that is empty if there are none."""
    members = {key: list(compress(group[key], is_member)) for key in ("params", "names")}
    return [{**group, **members}] if members["names"] else []
