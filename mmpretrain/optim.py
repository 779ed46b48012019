"""The optimiser: AdamW over each tower's parameters, and the guard that skips a step that is not finite."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mmpretrain.usage import check_number

TOWERS = ("image", "text", "heads")
_OF_A_TOWER = ("lr", "weight_decay")


def tower_of(parameter_name: str) -> str:
    """`image`, `text`, or `heads` for projections and what belongs to objectives."""
    for tower in ("image", "text"):
        if parameter_name.startswith(f"model.{tower}."):
            return tower
    return "heads"


def _decays(parameter: nn.Parameter) -> bool:
    """Matrices decay; biases, norms, scales and single tokens, which have one dimension larger than 1, do not."""
    return sum(size > 1 for size in parameter.shape) > 1


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
        parameters: named as in the task; frozen ones are left out.
        lr, weight_decay, betas, eps: as in the paper; no decay acts on one-dimensional parameters.
        towers: `lr` and `weight_decay` of `image`, `text` or `heads`, where they differ; None means as above.

    Raises: ValueError if `towers` names another tower or argument, and for numbers out of range.
    """
    check_number("optimizer.lr", lr, at_least=0)
    check_number("optimizer.weight_decay", weight_decay, at_least=0)
    check_number("optimizer.eps", eps, at_least=0)
    for i, beta in enumerate(betas):
        check_number(f"optimizer.betas[{i}]", beta, at_least=0, below=1)
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
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: its own times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def grad_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The gradient's 2-norm over each tower and (`all`) over all of them, scalars on the device."""
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group["tower"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {tower: torch.nn.utils.get_total_norm(grads) for tower, grads in gradients.items()}
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
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by the fused kernels
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by `<parameter>/<name of the state>`: exp_avg, exp_avg_sq and step of each parameter."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises: KeyError if a parameter's state is missing."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            optimizer.state[parameter] = {
                key: tensors[f"{name}/{key}"].to(parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
