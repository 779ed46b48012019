"""The optimiser against torch's own AdamW and clipping, and steps that are not finite."""

import copy

import pytest
import torch
from torch import Tensor

from mmpretrain import optim
from mmpretrain.training.task import Task
from tests.optim.tasks import adamw, fill_gradients, make_task, step


def test_set_lr_keeps_the_ratio_of_towers() -> None:
    optimizer = adamw(make_task(), towers={"image": {"lr": 0.2}})
    for factor in (0.5, 0.1):
        optim.set_lr(optimizer, factor)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(factor * (0.2 if group["tower"] == "image" else 0.1))


def test_norms_are_those_of_each_tower_and_of_all() -> None:
    task = make_task()
    fill_gradients(task, 0)
    norms = optim.grad_norms(adamw(task))
    parts: dict[str, list[Tensor]] = {"image": [], "text": [], "heads": [], "all": []}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        tower = name.split(".")[1] if name.startswith(("model.image.", "model.text.")) else "heads"
        parts[tower].append(parameter.grad.flatten())
        parts["all"].append(parameter.grad.flatten())
    assert set(norms) == set(parts)
    for tower, gradients in parts.items():
        torch.testing.assert_close(norms[tower], torch.cat(gradients).norm())


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_steps_are_those_of_torchs_adamw_after_its_clip_grad_norm(max_norm: float | None) -> None:
    task = make_task()
    reference = copy.deepcopy(task)
    decays = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
    for parameter in reference.parameters():
        decays[parameter.squeeze().ndim > 1].append(parameter)
    groups = [{"params": decays[True]}, {"params": decays[False], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    optimizer = adamw(task)
    for seed in range(3):
        for each in (task, reference):
            fill_gradients(each, seed)
        assert step(optimizer, max_norm).item() == 0
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        theirs.step()
    for (name, mine), other in zip(task.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def bits(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = {**dict(task.named_parameters()), **optim.optimizer_tensors(optimizer)}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_leaves_everything_bit_identical(bad: float, max_norm: float | None) -> None:
    task = make_task()
    optimizer = adamw(task)
    fill_gradients(task, 0)
    step(optimizer, max_norm)
    before = bits(task, optimizer)
    fill_gradients(task, 1)
    assert task.model.image_projection.weight.grad is not None
    task.model.image_projection.weight.grad[0, 0] = bad
    assert step(optimizer, max_norm).item() == 1
    assert bits(task, optimizer) == before
    assert all(parameter.grad is None for parameter in task.parameters())

    uninterrupted = make_task()
    uninterrupted.load_state_dict(task.state_dict())
    other = adamw(uninterrupted)
    optim.load_optimizer_state(other, optim.optimizer_tensors(optimizer), optim.optimizer_numbers(optimizer))
    for each, its_optimizer in ((task, optimizer), (uninterrupted, other)):
        fill_gradients(each, 2)
        assert step(its_optimizer, max_norm).item() == 0
    assert bits(task, optimizer) == bits(uninterrupted, other)


def test_a_first_step_that_is_not_finite_counts_for_nothing() -> None:
    task = make_task()
    fresh = copy.deepcopy(task)
    optimizer, other = adamw(task), adamw(fresh)
    fill_gradients(task, 0, scale=float("nan"))
    step(optimizer)
    for each, its_optimizer in ((task, optimizer), (fresh, other)):
        fill_gradients(each, 1)
        step(its_optimizer)
    assert bits(task, optimizer) == bits(fresh, other)


def test_state_comes_back_bit_identical_into_another_optimizer() -> None:
    task = make_task()
    optimizer = adamw(task)
    fill_gradients(task, 0)
    step(optimizer)
    saved = {name: tensor.clone() for name, tensor in optim.optimizer_tensors(optimizer).items()}
    assert set(saved) == {
        f"{name}/{key}" for name, _ in task.named_parameters() for key in ("exp_avg", "exp_avg_sq", "step")
    }
    twin = copy.deepcopy(task)
    restored = adamw(twin)
    optim.load_optimizer_state(restored, saved, optim.optimizer_numbers(optimizer))
    for each, its_optimizer in ((task, optimizer), (twin, restored)):
        fill_gradients(each, 1)
        step(its_optimizer)
    assert bits(task, optimizer) == bits(twin, restored)
    assert saved["objectives.infonce.logit_scale/step"].item() == 1, "the saved tensors are copied, not taken over"


def test_a_state_of_a_parameter_that_is_not_trained_is_refused() -> None:
    task = make_task()
    optimizer = adamw(task)
    fill_gradients(task, 0)
    step(optimizer)
    saved = optim.optimizer_tensors(optimizer)
    task.model.image_projection.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"state of model\.image_projection\.weight, which this run does not train"):
        optim.load_optimizer_state(adamw(task), saved, {})
