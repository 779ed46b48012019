"""Building objects from `_target_`: signatures, and what they are initialised with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from mmpretrain.config.instantiate import check_targets, instantiate
from mmpretrain.errors import UsageError

if TYPE_CHECKING:
    from mmpretrain.batch import Batch

HERE = __name__


class Part:
    """Takes one argument of each kind. Its annotations are strings, as in any module that delays them."""

    def __init__(
        self,
        model: nn.Module,
        number: float = 1.0,
        count: int = 1,
        flag: bool = False,
        name: str | None = None,
        choice: Literal["a", "b"] = "a",
        pair: tuple[float, float] = (0.0, 1.0),
        numbers: Sequence[float] = (),
        nested: Mapping[str, Mapping[str, float | None]] | None = None,
        plain_list: list = [],  # noqa: B006
        plain_dict: dict | None = None,
        anything: Any = None,
        part: Part | None = None,
    ) -> None:
        self.given = (number, numbers, part)


class Delayed:
    def __init__(self, batch: Batch | None = None, size: int = 1) -> None:
        self.size = size


def takes_more(first: int, *rest: int, **more: float) -> tuple[int, dict[str, float]]:
    return first, more


def random_weight(size: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(size) * scale


@pytest.mark.parametrize(
    "arguments",
    [
        {"number": 1},
        {"number": 0.5, "count": 3, "flag": True, "name": "x", "choice": "b"},
        {"name": None},
        {"pair": [0.9, 1]},
        {"numbers": [1, 2.5]},
        {"nested": {"image": {"lr": None, "decay": 0.1}}},
        {"plain_list": [1, "a"], "plain_dict": {"a": 1}, "anything": object},
        {"part": {"_target_": f"{HERE}.Part", "model": {"_target_": f"{HERE}.Delayed"}}},
    ],
)
def test_arguments_that_fit_are_accepted(arguments: dict[str, Any]) -> None:
    check_targets({"_target_": f"{HERE}.Part", **arguments}, "part", runtime=("model",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": "fast"}, "part.number is 'fast'; expected float"),
        ({"number": True}, "part.number is True; expected float"),
        ({"number": [1.0]}, r"part.number is \[1.0\]; expected float"),
        ({"count": 1.5}, "part.count is 1.5; expected int"),
        ({"flag": 1}, "part.flag is 1; expected bool"),
        ({"name": 5}, r"part.name is 5; expected str \| None"),
        ({"choice": "c"}, r"part.choice is 'c'; expected Literal\['a', 'b'\]"),
        ({"pair": [0.9]}, r"part.pair is \[0.9\]; expected tuple\[float, float\]"),
        ({"numbers": "12"}, r"part.numbers is '12'; expected Sequence\[float\]"),
        ({"numbers": [1, "2"]}, r"part.numbers is \[1, '2'\]; expected Sequence\[float\]"),
        ({"nested": {"image": {"lr": "x"}}}, "part.nested is "),
        ({"plain_list": "x"}, "part.plain_list is 'x'; expected list"),
        ({"part": {"numbre": 1}}, "part.part is "),
        (
            {"part": {"_target_": f"{HERE}.Part", "numbre": 1}},
            "'part.part.numbre'; did you mean 'number'",
        ),
        ({"part": {"_target_": f"{HERE}.Part"}}, "part.part.model is missing; expected Module"),
        ({"numbre": 1}, "'part.numbre'; did you mean 'number'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_targets({"_target_": f"{HERE}.Part", **arguments}, "part", runtime=("model",))


def test_annotation_that_only_type_checkers_see_is_no_hindrance() -> None:
    check_targets({"_target_": f"{HERE}.Delayed", "size": 2}, "part")
    with pytest.raises(UsageError, match=r"'part\.sise'; did you mean 'size'"):
        check_targets({"_target_": f"{HERE}.Delayed", "sise": 2}, "part")


def test_target_that_takes_any_argument_gets_it() -> None:
    node = {"_target_": f"{HERE}.takes_more", "first": 1, "second": 0.5}
    check_targets(node, "part")
    assert instantiate(node, 0, "part") == (1, {"second": 0.5})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.Part", "No module named 'nowhere'"),
        (f"{HERE}.Prat", "has no attribute 'Prat'"),
        ("Part", "cannot be imported"),
        (f"{HERE}.HERE", "expected a class or function"),
    ],
)
def test_target_that_cannot_be_built_is_named(target: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"part\._target_ is '{target}'.*{message}") as raised:
        check_targets({"_target_": target}, "part")
    assert "\n" not in str(raised.value)


def test_what_an_object_is_initialised_with_depends_on_its_own_path_alone() -> None:
    node = {"_target_": f"{HERE}.random_weight", "size": 5}
    alone = instantiate({"b": node}, 0, "model")
    beside = instantiate({"a": node, "b": node}, 0, "model")
    assert torch.equal(alone["b"], beside["b"])
    assert not torch.equal(beside["a"], beside["b"])
    assert not torch.equal(instantiate({"b": node}, 1, "model")["b"], alone["b"])


def test_building_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    instantiate({"_target_": f"{HERE}.random_weight", "size": 5}, 0, "model")
    assert torch.equal(torch.get_rng_state(), state)


def test_partial_waits_for_its_last_arguments() -> None:
    node = {"_target_": f"{HERE}.random_weight", "_partial_": True, "scale": 0.0}
    assert torch.equal(instantiate(node, 0, "model")(3), torch.zeros(3))
