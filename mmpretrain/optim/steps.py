"""Steps of an optimiser that are skipped if the gradient is not finite, and its state for checkpoints."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmpretrain import distributed
from mmpretrain.errors import TrainingError
from mmpretrain.optim.groups import GROUP_KEYS


def twins(
    optimizer: torch.optim.Optimizer, parameters: Callable[[], list[nn.Parameter]]
) -> Iterator[tuple[torch.optim.Optimizer, list[nn.Parameter]]]:
    """Build small optimisers with the class of `optimizer` and the options of each of its groups.

    Args:
        optimizer: the optimiser.
        parameters: function that returns the parameters of each of them.

    Yields: (optimiser, parameters of the group whose options it has).
    """
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "names")}
        yield kind([{**options, "params": parameters()}]), group["params"]


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


def guarded_step(
    optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float | None, is_refused: Tensor | None = None
) -> Tensor:
    """Clip the gradient to `max_norm`, take a step if the gradient is finite and not refused, and clear it.

    Otherwise parameters and moments stay bit-identical. With fused kernels the check does not synchronise with
    the host.

    Args:
        optimizer: the optimiser.
        norm: norm of the gradient, a scalar.
        max_norm: largest norm of the clipped gradient; None: no clipping.
        is_refused: a float32 scalar, 1 to skip the step whatever its gradient, else 0; None: 0.

    Returns: a float32 scalar, 1 if the step was skipped, else 0.
    """
    skipped = (~torch.isfinite(norm)).float()
    if is_refused is not None:
        skipped = torch.maximum(skipped, is_refused)
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


@runtime_checkable
class AveragingOptimizer(Protocol):
    """Protocol of an optimiser that averages weights itself, such as schedule-free ones (Defazio et al. 2024).

    `eval()` changes the parameters to their average, and `train()` back to the point at which gradients are taken. Neither
    changes the state of a parameter.
    """

    def train(self) -> object: ...

    def eval(self) -> object: ...


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the optimiser's state, keyed `<parameter>/<state>`, such as AdamW's `exp_avg`."""
    return {key: value for key, value in _states(optimizer) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the rest of the optimiser's state, plain values for JSON, keyed as in `optimizer_tensors`.

    Raises: TrainingError for a value that JSON cannot hold.
    """
    numbers = {key: value for key, value in _states(optimizer) if not isinstance(value, Tensor)}
    for key, value in numbers.items():
        if not isinstance(value, bool | int | float | list | None):
            raise TrainingError(
                f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state ({key}), which a checkpoint cannot "
                "hold; expected tensors and numbers: choose another optimizer"
            )
    return numbers


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(optimizer.param_groups):
        # Some optimisers count steps, or sum up weights, per group: such values are no defaults, or differ from them.
        for key, value in group.items():
            is_given = key in GROUP_KEYS or (key in optimizer.defaults and _same(value, optimizer.defaults[key]))
            if not is_given:
                yield f"group{i}/{key}", value
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", value


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and bool(value == default))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Restore the state that `optimizer_tensors` and `optimizer_numbers` returned, sharded like the parameters.

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
        for name in group["names"]:
            if name in values:
                state[index] = {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in values.pop(name).items()
                }
            index += 1
    if values:
        raise ValueError(f"the checkpoint has optimiser state of {', '.join(values)}, which this run does not train")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
