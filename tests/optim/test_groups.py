"""Parameter groups: weight decay and learning rates by tower, layer and name."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mmpretrain import optim
from mmpretrain.config import instantiate
from mmpretrain.models.layers import layers_above
from mmpretrain.training.task import Task
from tests.optim.tasks import DEFAULTS, adamw, make_task, step


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
    instantiate.check_targets(node, "optimizer", ("parameters", "layers"))
    task = make_task()
    optimizer = instantiate.instantiate(node, 0, "optimizer")(task.named_parameters())
    assert {group["lr"] for group in optimizer.param_groups if group["tower"] == "image"} == {0.3}


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"vision": {"lr": 0.1}}, r"^optimizer.towers has 'vision'; expected one of image, text, heads$"),
        ({"heads": {"layer_decay": 0.5}}, r"^optimizer.towers.heads has 'layer_decay'; expected lr or weight_decay$"),
        (
            {"text": {"layer_decay": 0}},
            r"^optimizer.towers.text.layer_decay is 0; expected a number above 0 and at most 1",
        ),
        ({"image": {"lrr": 0.1}}, r"^optimizer.towers.image has 'lrr'; expected lr or weight_decay or layer_decay$"),
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


def rates(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter."""
    return {name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["names"]}


def test_without_layer_decay_and_patterns_the_groups_are_two_per_tower_in_the_order_of_the_parameters() -> None:
    task = make_task()
    optimizer = adamw(
        task, towers={"image": {"layer_decay": None}}, groups=[], layers=partial(layers_above, task.model)
    )
    found = [(group["tower"], group["weight_decay"] > 0) for group in optimizer.param_groups]
    assert found == [
        ("image", False), ("image", True), ("text", True), ("text", False), ("heads", True), ("heads", False),
    ]  # fmt: skip
    keys = {"params", "names", "tower", "lr", "base_lr", "weight_decay"}
    assert set(optim.parameter_groups(task.named_parameters(), 0.1, 0.5, {})[0]) == keys
    order = [name for name, _ in task.named_parameters()]
    for group in optimizer.param_groups:
        assert group["names"] == [name for name in order if name in group["names"]]


def scale_of_beit(name: str, decay: float) -> float:
    """decay ** (L + 1 - l) for towers of L = 2 blocks: l is 0 in the stem, i + 1 in block i, L + 1 for the rest (BEiT).

    As in timm, the final norm belongs to the last block.
    """
    if "embed" in name or "token" in name:
        return decay**3
    for i in range(2):
        if f"blocks.{i}." in name:
            return decay ** (3 - (i + 1))
    return decay


def test_layer_decay_is_that_of_beit_in_each_tower() -> None:
    task = make_task()
    towers = {"image": {"layer_decay": 0.75, "lr": 0.2}, "text": {"layer_decay": 0.5}}
    found = rates(adamw(task, towers=towers, layers=partial(layers_above, task.model)))
    for name, (lr, _) in found.items():
        expected = 0.1
        if name.startswith("model.image."):
            expected = 0.2 * scale_of_beit(name, 0.75)
        elif name.startswith("model.text."):
            expected = 0.1 * scale_of_beit(name, 0.5)
        assert lr == pytest.approx(expected, rel=1e-12), name


def test_layer_decay_of_an_image_tower_is_timms_own() -> None:
    from timm.optim import param_groups_layer_decay

    task = make_task()
    trunk: Any = task.model.image.trunk  # type: ignore[attr-defined]
    theirs = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(trunk, layer_decay=0.75)
        for parameter in group["params"]
    }
    found = rates(adamw(task, towers={"image": {"layer_decay": 0.75}}, layers=partial(layers_above, task.model)))
    for name, parameter in trunk.named_parameters():
        # The trunk has no head, so that timm counts from the last block.
        assert found[f"model.image.trunk.{name}"][0] == pytest.approx(0.1 * 0.75 * theirs[id(parameter)]), name


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(ValueError, match=r"optimizer.towers.text.layer_decay is 0.5, but .* passes no `layers`"):
        adamw(make_task(), towers={"text": {"layer_decay": 0.5}})
    task = make_task()
    task.model.text = nn.Linear(3, 3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model.text is a Linear, which does not tell its layers"):
        adamw(task, towers={"text": {"layer_decay": 0.5}}, layers=partial(layers_above, task.model))


def test_the_first_matching_pattern_counts() -> None:
    task = make_task()
    groups = [
        {"match": "*.blocks.1.*", "lr": 0.7},
        {"match": "model.image.*", "lr_factor": 0.5, "weight_decay": 0.25},
        {"match": "*.logit_scale", "lr_factor": 0},
    ]
    towers = {"image": {"layer_decay": 0.75}}
    layers = partial(layers_above, task.model)
    found = rates(adamw(task, towers=towers, groups=groups, layers=layers))
    plain = rates(adamw(task, towers=towers, layers=layers))
    for name, (lr, decay) in plain.items():
        if ".blocks.1." in name and name.startswith("model.image."):
            lr = 0.7
        elif name.startswith("model.image."):
            lr, decay = lr * 0.5, 0.25 if decay else 0.0
        elif name.endswith("logit_scale"):
            lr = 0
        assert found[name] == pytest.approx((lr, decay)), name
    assert any(name.startswith("objectives") and ".blocks.1." not in name for name in found)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "*.pos_embd"}], r"^optimizer.groups\[0\].match is '\*.pos_embd', .*no parameter; .*pos_embed"),
        (
            [{"match": "model.image.blocks.*"}],
            r"matches no parameter; near names: model.image.trunk.blocks.0.norm1.weight",
        ),
        (
            [{"match": "*"}, {"match": "*.bias"}],
            r"^optimizer.groups\[1\].match is '\*.bias', whose parameters all match",
        ),
        ([{"match": "*.bias", "weight_decay": 0.1}], r"matches only biases, norms and scales"),
        ([{"match": "*", "lr": 1, "lr_factor": 1}], r"^optimizer.groups\[0\] has lr and lr_factor"),
        ([{"match": "*", "lr_facto": 1}], r"^optimizer.groups\[0\] has 'lr_facto'; did you mean 'lr_factor'"),
        ([{"lr": 1}], r"^optimizer.groups\[0\].match is None; expected a glob pattern"),
        ([{"match": "*", "lr": "fast"}], r"^optimizer.groups\[0\].lr is 'fast'; expected a number"),
        ([{"match": "*", "lr": -1}], r"^optimizer.groups\[0\].lr is -1; expected a number at least 0"),
    ],
)
def test_patterns_without_effect_are_refused_in_one_line(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adamw(make_task(), groups=groups)
    assert "\n" not in str(error.value)
