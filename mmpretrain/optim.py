"""The optimiser: groups of parameters by tower, optimisers by name, and the guard that skips a step that is not finite."""

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

# adahessian wants a second backward pass, kron keeps state that no checkpoint can hold, lookahead wraps another.
_UNSUITABLE = ("adahessian", "kron", "lookahead")


def tower_of(parameter_name: str) -> str:
    """`image`, `text`, or `heads` for projections and what belongs to objectives."""
    for tower in ("image", "text"):
        if parameter_name.startswith(f"model.{tower}."):
            return tower
    return "heads"


def _decays(parameter: nn.Parameter) -> bool:
    """Matrices decay; biases, norms, scales and single tokens, which have one dimension larger than 1, do not."""
    return sum(size > 1 for size in parameter.shape) > 1


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    towers: Mapping[str, Mapping[str, float | None]],
) -> list[dict[str, Any]]:
    """An optimiser's groups: the parameters of each tower, those that decay apart from those that do not.

    Args:
        parameters: named as in the task; frozen ones are left out.
        lr, weight_decay: no decay acts on one-dimensional parameters.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads`, where they differ; None means as above.

    Raises: ValueError if `towers` names another tower or argument, and for numbers out of range.
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

    Raises: ValueError for numbers out of range, and what `parameter_groups` does.
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
    """An optimiser of `torch.optim`.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above.
        name: `SGD`, `Adam`, `NAdam`, ...
        args: its further arguments.

    Raises: ValueError if torch has none of that name or it refuses an argument, and what `parameter_groups` does.
    """
    kinds = {key: kind for key, kind in vars(torch.optim).items() if isinstance(kind, type)}
    kinds = {key: kind for key, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    # The loss is not computed again, and gradients are dense.
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
    """An optimiser of timm.

    Args:
        parameters: see `parameter_groups`.
        lr: the learning rate, before the schedule's factor.
        weight_decay: the decay of matrices; biases, norms and scales have none.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads` (projections and objectives' parameters), where
            they differ; null means the ones above.
        name: one of `timm.optim.list_optimizers()`, such as `lion`, `lamb`, `adafactorbv`.
        args: its further arguments.

    Raises: ValueError if timm has none of that name or it refuses an argument, and what `parameter_groups` does.
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
    """An optimiser of the same kind and options as the first group's, of other parameters."""
    options = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "names")}
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
    return kind([{**options, "params": parameters}])


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: its own times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def grad_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The gradient's 2-norm over each tower and (`all`) over all of them, scalars on the device."""
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group["tower"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {tower: torch.nn.utils.get_total_norm(grads) for tower, grads in gradients.items()}
    norms = {tower: distributed.full(norm) for tower, norm in norms.items()}
    norms["all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms


def guarded_step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float | None) -> Tensor:
    """Clip the gradient to `max_norm`, take the step if the gradient is finite, and clear it.

    A gradient that is not finite leaves parameters and moments bit-identical; the decision stays on the device.

    Returns: whether the step was skipped, a float32 scalar of 0 or 1.
    """
    skipped = (~torch.isfinite(norm)).float()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by the fused kernels
        optimizer.step()
    elif not skipped:  # without fused kernels the host has to look
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimiser's state by `<parameter>/<name of the state>`, such as AdamW's exp_avg."""
    return {key: value for key, value in _states(optimizer) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The rest of it by the same names, plain values for JSON."""
    return {key: value for key, value in _states(optimizer) if not isinstance(value, Tensor)}


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:  # some optimisers of timm count once for a group
            yield f"group{i}/step", group["step"]
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` and `optimizer_numbers` gave.

    Raises: ValueError if some of it belongs to no parameter of the optimiser.
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
