"""Optimisers: parameter groups by tower, optimisers by name, and steps that are skipped if the gradient is not finite."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from mmpretrain import distributed
from mmpretrain.errors import check_number, nearest

TOWERS = ("image", "text", "heads")
_OF_A_TOWER = ("lr", "weight_decay")

# adahessian needs a second backward pass, kron has state that cannot be checkpointed, lookahead wraps another optimiser.
_UNSUITABLE = ("adahessian", "kron", "lookahead")


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
    towers: Mapping[str, Mapping[str, float | None]],
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimiser: per tower, one with and one without weight decay.

    Args:
        parameters: (name in the task, parameter); frozen parameters are omitted.
        lr: learning rate.
        weight_decay: weight decay; it does not act on one-dimensional parameters.
        towers: overrides of `lr` and `weight_decay` for `image`, `text` or `heads`; None: the value above.

    Raises: ValueError if `towers` has an unknown tower or argument, or a number is out of range.
    """
    check_number("optimizer.lr", lr, at_least=0)
    check_number("optimizer.weight_decay", weight_decay, at_least=0)
    if unknown := sorted(set(towers) - set(TOWERS)):
        raise ValueError(f"optimizer.towers has {unknown[0]!r}; expected one of {', '.join(TOWERS)}")
    for tower, own in towers.items():
        if unknown := sorted(set(own) - set(_OF_A_TOWER)):
            raise ValueError(f"optimizer.towers.{tower} has {unknown[0]!r}; expected {' or '.join(_OF_A_TOWER)}")
        for argument, value in own.items():
            if value is not None:
                check_number(f"optimizer.towers.{tower}.{argument}", value, at_least=0)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    names: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            key = (tower_of(name), _decays(parameter))
            members.setdefault(key, []).append(parameter)
            names.setdefault(key, []).append(name)
    groups = []
    for (tower, decays), params in members.items():
        own_lr, own_decay = (towers.get(tower, {}).get(argument) for argument in _OF_A_TOWER)
        tower_lr = lr if own_lr is None else own_lr
        decay = weight_decay if own_decay is None else own_decay
        groups.append(
            {
                "params": params,
                "names": names[tower, decays],
                "tower": tower,
                "lr": tower_lr,
                "base_lr": tower_lr,
                "weight_decay": decay if decays else 0.0,
            }
        )
    return groups


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    towers: Mapping[str, Mapping[str, float | None]],
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with fused kernels.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above.
        betas: decay rates of the first and second moments.
        eps: added to the denominator.

    Raises: ValueError if a number is out of range, and in the cases of `parameter_groups`.
    """
    check_number("optimizer.eps", eps, at_least=0)
    for i, beta in enumerate(betas):
        check_number(f"optimizer.betas[{i}]", beta, at_least=0, below=1)
    groups = parameter_groups(parameters, lr, weight_decay, towers)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def torch_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
    args: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build an optimiser of `torch.optim`.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above.
        name: `SGD`, `Adam`, `NAdam`, ...
        args: its further arguments.

    Raises: ValueError if torch has no such optimiser or it rejects an argument, and in the cases of `parameter_groups`.
    """
    kinds = {key: kind for key, kind in vars(torch.optim).items() if isinstance(kind, type)}
    kinds = {key: kind for key, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    # LBFGS needs to recompute the loss, and SparseAdam needs sparse gradients.
    del kinds["Optimizer"], kinds["LBFGS"], kinds["SparseAdam"]
    if name not in kinds:
        raise ValueError(f"optimizer.name is {name!r}; {nearest(name, list(kinds))}")
    return _built(
        name, lambda groups: kinds[name](groups, lr=lr, **(args or {})), parameters, lr, weight_decay, towers, args
    )


def timm_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
    args: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build an optimiser of timm.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above.
        name: one of `timm.optim.list_optimizers()`, such as `lion`, `lamb`, `adafactorbv`.
        args: further arguments of the optimiser.

    Raises: ValueError if timm has no such optimiser, it is not supported or it rejects an argument, and in the cases of
        `parameter_groups`.
    """
    known = [str(each) for each in timm.optim.list_optimizers() if not str(each).startswith(_UNSUITABLE)]
    if name not in known:
        raise ValueError(f"optimizer.name is {name!r}; {nearest(name, known)}")
    kind: Callable[..., torch.optim.Optimizer] = timm.optim.get_optimizer_class(name, bind_defaults=True)
    return _built(name, lambda groups: kind(groups, lr=lr, **(args or {})), parameters, lr, weight_decay, towers, args)


def _built(
    name: str,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
    args: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    groups = parameter_groups(parameters, lr, weight_decay, towers)
    try:
        return make(groups)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise ValueError(f"optimizer.name={name} refuses optimizer.args {dict(args or {})}: {error}") from error


def twin(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build an optimiser for `parameters`, with the class of `optimizer` and the options of its first group."""
    options = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "names")}
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
    return kind([{**options, "params": parameters}])


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to its base value times the factor of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the gradients of all parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def grad_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the 2-norm of the gradient of each tower and of all towers (`all`), scalars on the device."""
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group["tower"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {tower: torch.nn.utils.get_total_norm(grads) for tower, grads in gradients.items()}
    norms = {tower: distributed.full(norm) for tower, norm in norms.items()}
    norms["all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms


def guarded_step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float | None) -> Tensor:
    """Clip the gradient to `max_norm`, take a step if the gradient is finite, and clear it.

    If it is not finite, parameters and moments stay bit-identical. With fused kernels the check does not synchronise with
    the host.

    Args:
        optimizer: the optimiser.
        norm: norm of the gradient, a scalar.
        max_norm: largest norm of the clipped gradient; None: no clipping.

    Returns: a float32 scalar, 1 if the step was skipped, else 0.
    """
    skipped = (~torch.isfinite(norm)).float()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by the fused kernels
        optimizer.step()
    elif not skipped:  # without fused kernels the host has to read the result
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the optimiser's state, keyed `<parameter>/<state>`, such as AdamW's `exp_avg`."""
    return {key: value for key, value in _states(optimizer) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the rest of the optimiser's state, plain values for JSON, keyed as in `optimizer_tensors`."""
    return {key: value for key, value in _states(optimizer) if not isinstance(value, Tensor)}


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:  # some optimisers of timm count steps per group
            yield f"group{i}/step", group["step"]
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Restore the state that `optimizer_tensors` and `optimizer_numbers` returned.

    Raises: ValueError if it contains a parameter that the optimiser does not have.
    """
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in {**tensors, **numbers}.items():
        owner, _, key = name.rpartition("/")
        values[owner][key] = value
    state: dict[int, dict[str, Any]] = {}
    index = 0
    for i, group in enumerate(optimizer.param_groups):
        group.update(values.pop(f"group{i}", {}))
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in values:
                state[index] = {
                    key: distributed.spread_like(value.clone(), parameter) if isinstance(value, Tensor) else value
                    for key, value in values.pop(name).items()
                }
            index += 1
    if values:
        raise ValueError(f"the checkpoint has optimiser state of {', '.join(values)}, which this run does not train")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
