"""The optimiser against torch's own AdamW and clipping, and steps that are not finite."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpretrain import optim
from mmpretrain.config import instantiate
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.training.task import Task
from tests import tiny

DEFAULTS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "towers": {}}


def make_task() -> Task:
    model = tiny.image_text(reg_tokens=1)
    mae = MAE(model, decoder_width=8, decoder_depth=1, decoder_heads=2)
    return tiny.randomize(Task(model, {"infonce": InfoNCE(model), "mae": mae}))


def adamw(task: nn.Module, **arguments: Any) -> torch.optim.AdamW:
    return optim.adamw(task.named_parameters(), **{**DEFAULTS, **arguments})


def fill_gradients(task: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def step(optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> Tensor:
    return optim.guarded_step(optimizer, optim.grad_norms(optimizer)["all"], max_norm)


def decay_factors(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a step with a gradient of zero multiplies each parameter by: the decay alone."""
    before = {name: value.detach().clone() for name, value in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(optimizer)
    return {name: float((value.detach() / before[name]).mean()) for name, value in task.named_parameters()}


def test_one_dimensional_parameters_and_single_tokens_do_not_decay() -> None:
    task = make_task()
    spared = set()
    for name, factor in decay_factors(task, adamw(task)).items():
        assert factor == pytest.approx(1.0 if factor == 1.0 else 0.95), name
        if factor == 1.0:
            spared.add(name)
    single = {
        "model.image.trunk.cls_token",
        "model.image.trunk.reg_token",
        "objectives.infonce.logit_scale",
        "objectives.mae.mask_token",
    }
    one_dimensional = {name for name, parameter in task.named_parameters() if parameter.ndim == 1}
    assert spared == one_dimensional | single
    assert "model.image.trunk.pos_embed" not in spared and "model.text.token_embedding.weight" not in spared


def test_towers_have_their_own_learning_rate_and_decay() -> None:
    task = make_task()
    towers = {"image": {"lr": 0.2}, "text": {"weight_decay": 1.0}, "heads": {"lr": 0.0, "weight_decay": None}}
    factors = decay_factors(task, adamw(task, towers=towers))
    assert factors["model.image.trunk.pos_embed"] == pytest.approx(1 - 0.2 * 0.5)
    assert factors["model.text.positional_embedding"] == pytest.approx(1 - 0.1 * 1.0)
    assert factors["model.image_projection.weight"] == factors["objectives.mae.predict.weight"] == 1


def test_a_tower_of_zero_decay_does_not_decay() -> None:
    task = make_task()
    factors = decay_factors(task, adamw(task, towers={"image": {"weight_decay": 0.0}}))
    assert factors["model.image.trunk.pos_embed"] == 1
    assert factors["model.text.positional_embedding"] == pytest.approx(0.95)


def test_towers_can_be_given_in_a_configuration() -> None:
    node = {"_target_": "mmpretrain.optim.adamw", "_partial_": True, **DEFAULTS, "towers": {"image": {"lr": 0.3}}}
    node["betas"] = list(node["betas"])
    instantiate.check_targets(node, "optimizer", ("parameters",))
    task = make_task()
    optimizer = instantiate.instantiate(node, 0, "optimizer")(task.named_parameters())
    assert {group["lr"] for group in optimizer.param_groups if group["tower"] == "image"} == {0.3}


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"vision": {"lr": 0.1}}, r"^optimizer.towers has 'vision'; expected one of image, text, heads$"),
        ({"image": {"lrr": 0.1}}, r"^optimizer.towers.image has 'lrr'; expected lr or weight_decay$"),
    ],
)
def test_unknown_towers_and_arguments_are_refused_in_one_line(towers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(make_task(), towers=towers)


def test_frozen_parameters_are_left_out() -> None:
    task = make_task()
    task.model.text.requires_grad_(False)
    names = {name for group in adamw(task).param_groups for name in group["names"]}
    assert names == {name for name, _ in task.named_parameters() if not name.startswith("model.text.")}


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


TORCH_ARGS = {"SGD": {"momentum": 0.9}, "Adam": {}, "NAdam": {}, "RMSprop": {}, "Adafactor": {}}
TIMM_NAMES = ("lion", "lamb", "adan", "adafactorbv", "nadamw", "muon")


def by_name(task: nn.Module, name: str) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "towers": {"text": {"lr": 0.02}}}
    make = optim.torch_optimizer if name in TORCH_ARGS else optim.timm_optimizer
    return make(task.named_parameters(), name=name, args=TORCH_ARGS.get(name, {}), **arguments)


@pytest.mark.parametrize("name", [*TORCH_ARGS, *TIMM_NAMES])
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
        (optim.timm_optimizer, "lionn", {}, r"^optimizer\.name is 'lionn'; did you mean 'lion'\?"),
    ],
)
def test_unknown_optimisers_and_arguments_are_told(make: Any, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_task().named_parameters(), name=name, lr=0.1, weight_decay=0.0, towers={}, args=args)
