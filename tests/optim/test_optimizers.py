"""Optimisers by name, Muon, and the state with which each goes on bit for bit."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mmpretrain import optim
from mmpretrain.errors import TrainingError
from mmpretrain.models.layers import layers_above
from tests.optim.tasks import fill_gradients, make_task, step

TORCH_ARGS = {"SGD": {"momentum": 0.9}, "Adam": {}, "NAdam": {}, "RMSprop": {}, "Adafactor": {}}
OTHER_NAMES = ("schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree", "torch.optim.AdamW")
TIMM_NAMES = ("lion", "lamb", "adan", "adafactorbv", "nadamw", "muon")


def by_name(task: nn.Module, name: str) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "towers": {"text": {"lr": 0.02}}}
    optimizer = optim.optimizer_by_name(task.named_parameters(), name=name, args=TORCH_ARGS.get(name, {}), **arguments)
    if isinstance(optimizer, optim.AveragingOptimizer):
        optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", [*TORCH_ARGS, *TIMM_NAMES, *OTHER_NAMES])
def test_any_optimiser_by_name_skips_bad_steps_and_goes_on_from_its_saved_state(name: str) -> None:
    task = make_task()
    optimizer = by_name(task, name)
    assert {group["lr"] for group in optimizer.param_groups if group["tower"] == "text"} == {0.02}
    for seed in range(3):
        fill_gradients(task, seed)
        assert step(optimizer) == 0
    weights = {key: value.clone() for key, value in task.state_dict().items()}
    fill_gradients(task, 3, scale=float("nan"))
    assert step(optimizer) == 1
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in weights.items())

    tensors = {key: value.clone() for key, value in optim.optimizer_tensors(optimizer).items()}
    numbers = json.loads(json.dumps(optim.optimizer_numbers(optimizer)))
    twin = copy.deepcopy(task)
    restored = by_name(twin, name)
    optim.load_optimizer_state(restored, tensors, numbers)
    for each, its_optimizer in ((task, optimizer), (twin, restored)):
        for seed in (4, 5):
            fill_gradients(each, seed)
            step(its_optimizer)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in task.state_dict().items())
    assert not all(torch.equal(value, task.state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("make", "name", "args", "message"),
    [
        (optim.torch_optimizer, "AdamWW", {}, r"^optimizer\.name is 'AdamWW'; did you mean 'AdamW'\?"),
        (optim.torch_optimizer, "LBFGS", {}, r"^optimizer\.name is 'LBFGS'"),
        (optim.torch_optimizer, "SGD", {"momentun": 1}, r"^optimizer\.name=SGD refuses optimizer\.args .*'momentun'"),
        (optim.torch_optimizer, "SparseAdam", {}, r"^optimizer\.name is 'SparseAdam'"),
        (optim.timm_optimizer, "adahessian", {}, r"^optimizer\.name is 'adahessian'"),
        (optim.timm_optimizer, "kron", {}, r"^optimizer\.name is 'kron'"),
        (
            optim.optimizer_by_name,
            "torch.optim.SparseAdam",
            {},
            r"'torch\.optim\.SparseAdam', which needs sparse gradients",
        ),
        (
            optim.optimizer_by_name,
            "timm.optim.Adahessian",
            {},
            r", which needs a second backward pass; expected another",
        ),
        (optim.timm_optimizer, "lionn", {}, r"^optimizer\.name is 'lionn'; did you mean 'lion'\?"),
    ],
)
def test_unknown_optimisers_and_arguments_are_told(make: Any, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_task().named_parameters(), name=name, lr=0.1, weight_decay=0.0, towers={}, args=args)


@pytest.mark.parametrize(
    ("name", "weight_decay", "message"),
    [
        (
            "no_such_library.Adam",
            0.0,
            r"cannot be imported \(ModuleNotFoundError: .*\); expected .*install its library",
        ),
        ("schedulefree.AdamWScheduleFre", 0.0, r"cannot be imported \(AttributeError"),
        ("torch.nn.Linear", 0.0, r"expected a subclass of torch.optim.Optimizer"),
        ("torch.optim.Rprop", 0.1, r"^optimizer.weight_decay is 0.1, but torch.optim.Rprop has none"),
    ],
)
def test_what_is_no_optimiser_of_a_library_is_told(name: str, weight_decay: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.optimizer_by_name(make_task().named_parameters(), name, 0.1, weight_decay, {})


def test_state_that_json_cannot_hold_is_told() -> None:
    task = make_task()
    optimizer = by_name(task, "SGD")
    optimizer.param_groups[0]["generator"] = object()
    with pytest.raises(TrainingError, match=r"SGD keeps a object in its state \(group0/generator\)"):
        optim.optimizer_numbers(optimizer)


MUON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "towers": {"text": {"lr": 0.02}}, "adamw_lr_factor": 0.5}


def muon(task: Any, **arguments: Any) -> torch.optim.Optimizer:
    return optim.muon(task.named_parameters(), layers=partial(layers_above, task.model), **{**MUON, **arguments})


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torchs_on_the_blocks_matrices_and_adamw_on_the_rest(nesterov: bool) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon")
    task = make_task()
    reference = copy.deepcopy(task)
    hidden, rest = [], []
    for name, parameter in reference.named_parameters():
        lr = 0.02 if name.startswith("model.text.") else 0.01
        is_hidden = "blocks." in name and not name.startswith("objectives") and parameter.ndim == 2
        decay = 0.1 if sum(size > 1 for size in parameter.shape) > 1 else 0.0
        group = {"params": [parameter], "weight_decay": decay, "lr": lr if is_hidden else 0.5 * lr}
        (hidden if is_hidden else rest).append(group)
    assert len(hidden) == 2 * 2 * 4
    theirs = [
        torch.optim.Muon(hidden, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-8),
    ]
    optimizer = muon(task, nesterov=nesterov, args={"ns_coefficients": "original"})
    for seed in range(3):
        for each in (task, reference):
            fill_gradients(each, seed)
        assert step(optimizer) == 0
        for each in theirs:
            each.step()
    for (name, mine), other in zip(task.named_parameters(), reference.parameters(), strict=True):
        # Muon orthogonalises in bfloat16; a step changes its matrices by 1e-3 on average.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-4 if mine.ndim == 2 else 1e-6, msg=name)


def test_muon_skips_bad_steps_and_goes_on_from_its_saved_state() -> None:
    task = make_task()
    optimizer = muon(task)
    fill_gradients(task, 0)
    step(optimizer)
    weights = {key: value.clone() for key, value in task.state_dict().items()}
    fill_gradients(task, 1, scale=float("inf"))
    assert step(optimizer) == 1
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in weights.items())
    tensors = {key: value.clone() for key, value in optim.optimizer_tensors(optimizer).items()}
    numbers = json.loads(json.dumps(optim.optimizer_numbers(optimizer)))
    twin = copy.deepcopy(task)
    restored = muon(twin)
    optim.load_optimizer_state(restored, tensors, numbers)
    for each, its_optimizer in ((task, optimizer), (twin, restored)):
        fill_gradients(each, 2)
        step(its_optimizer)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in task.state_dict().items())


def test_adamw_keeps_no_numbers_beside_its_tensors() -> None:
    """state.json of a run with AdamW is what it was before optimisers could have numbers of a group."""
    task = make_task()
    optimizer = optim.adamw(task.named_parameters(), 0.1, 0.5, (0.9, 0.95), 1e-8, {})
    fill_gradients(task, 0)
    step(optimizer)
    optim.set_lr(optimizer, 0.5)
    assert optim.optimizer_numbers(optimizer) == {}
