"""Instantiation of `_target_` nodes: what fits a signature, what is refused in which words, and how parts are built."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from mmpretrain.config.instantiate import call, check_targets, expected_type, find, instantiate, resolve
from mmpretrain.errors import UsageError

if TYPE_CHECKING:
    from mmpretrain.batch import Batch

HERE = __name__


class Kind(str, Enum):
    one = "one"
    two = "two"


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
        kind: Kind = Kind.one,
    ) -> None:
        self.given = (number, numbers, part)

    class Inner:
        """A class that only its owner's name leads to."""


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
        {"kind": "two"},
        {"kind": Kind.one},
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
        ({"kind": "three"}, r"part.kind is 'three'; expected one of one, two"),
        ({"number": float("inf")}, r"part.number is inf; expected a finite number: part.number=\.\.\."),
        ({"number": float("nan")}, r"part.number is nan; expected a finite number"),
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
        ({"numbre": 1}, r"^unknown configuration key 'part.numbre'; did you mean 'number'\?$"),
        ({"xyzzy": 1}, r"'part.xyzzy'; expected one of: anything, choice, count, "),
        ({"model": None}, r"^unknown configuration key 'part\.model'"),  # what is passed at run time is not configured
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


def test_a_target_without_parameters_expects_nothing() -> None:
    with pytest.raises(UsageError, match=r"^unknown configuration key 'part\.size'; nothing is expected there$"):
        check_targets({"_target_": f"{HERE}.Part.Inner", "size": 1}, "part")


def test_targets_in_lists_are_checked_under_their_index() -> None:
    good, bad = ({"_target_": f"{HERE}.random_weight", "size": size} for size in (1, "x"))
    with pytest.raises(UsageError, match=r"^augment\[1\]\.size is 'x'; expected int: augment\[1\]\.size="):
        check_targets([good, bad], "augment")


def test_keys_beside_the_arguments_are_known_and_suggested() -> None:
    node = {"_target_": f"{HERE}.Delayed", "weight": 1.0}
    check_targets(node, "objective.a", beside=("weight",))
    with pytest.raises(UsageError, match=r"'objective\.a\.wieght'; did you mean 'weight'\?"):
        check_targets({"_target_": f"{HERE}.Delayed", "wieght": 1.0}, "objective.a", beside=("weight",))


def test_a_missing_argument_is_named_unless_the_node_is_partial() -> None:
    node = {"_target_": f"{HERE}.random_weight"}
    with pytest.raises(UsageError, match=r"^part\.size is missing; expected int: part\.size=\.\.\.$"):
        check_targets(node, "part")
    check_targets({**node, "_partial_": True}, "part")
    with pytest.raises(UsageError, match=r"^part\.scale is 'x'; expected float"):
        check_targets({**node, "_partial_": True, "scale": "x"}, "part")


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (float, "float"),
        (Kind, "one of one, two"),
        (Sequence[float], "Sequence[float]"),
        (Mapping[str, int] | None, "Mapping[str, int] | None"),
        (Literal["a", 1], "Literal['a', 1]"),
    ],
)
def test_types_are_named_without_their_modules(annotation: Any, text: str) -> None:
    assert expected_type(annotation) == text


def test_a_class_in_a_class_is_found_and_an_error_of_a_module_is_passed_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(f"{HERE}.Part.Inner") is Part.Inner
    (tmp_path / "needs_another.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "is_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, message in (
        ("needs_another", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("is_broken", "ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(
            UsageError, match=rf"^part\._target_ is '{module}\.Thing', which cannot be imported \({message}\)"
        ):
            check_targets({"_target_": f"{module}.Thing"}, "part")


# ---------------------------------------------------------------------------------------------- building


def fails(kind: str, message: str) -> None:
    raise {"value": ValueError, "type": TypeError, "usage": UsageError}[kind](message)


def seed_of(**parts: Any) -> tuple[int, dict[str, Any]]:
    """The seed that it is built with, and its arguments."""
    return torch.initial_seed(), parts


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


def test_nested_nodes_are_built_first_wherever_they_stand() -> None:
    part = {"_target_": f"{HERE}.takes_more", "first": 1}
    node = {"_target_": f"{HERE}.takes_more", "first": 2, "a": part, "b": [part, 3], "c": {"d": part}, "e": (4, part)}
    built = (1, {})
    assert instantiate(node, 0, "part") == (2, {"a": built, "b": [built, 3], "c": {"d": built}, "e": [4, built]})
    assert instantiate([part, {"a": part}, "text", None, 0.5], 0, "parts") == [built, {"a": built}, "text", None, 0.5]


def test_arguments_of_run_time_go_to_the_outermost_target_alone() -> None:
    node = {"_target_": f"{HERE}.takes_more", "first": 1, "inner": {"_target_": f"{HERE}.takes_more", "first": 2}}
    assert instantiate(node, 0, "part", given=5) == (1, {"inner": (2, {}), "given": 5})


def test_a_partial_node_may_be_an_argument_and_holds_built_parts() -> None:
    partial = {
        "_target_": f"{HERE}.takes_more",
        "_partial_": True,
        "inner": {"_target_": f"{HERE}.takes_more", "first": 2},
    }
    first, more = instantiate({"_target_": f"{HERE}.takes_more", "first": 1, "factory": partial}, 0, "part")
    assert first == 1 and isinstance(more["factory"], functools.partial)
    assert more["factory"](7, x=1) == (7, {"inner": (2, {}), "x": 1})
    whole = {"_target_": f"{HERE}.takes_more", "_partial_": False, "first": 1}
    assert instantiate(whole, 0, "part") == (1, {})


def test_the_seed_of_an_object_is_that_of_its_full_name() -> None:
    """In a list, in a dictionary, or on its own, and whatever stands beside it or below it."""
    node = {"_target_": f"{HERE}.seed_of"}
    alone = {
        path: instantiate(node, 3, path)[0] for path in ("model", "model.a", "model.b[0]", "model.b[1]", "model.c.d")
    }
    assert len(set(alone.values())) == len(alone)
    seed, parts = instantiate({**node, "a": node, "b": [node, node], "c": {"d": node}}, 3, "model")
    found = {
        "model": seed, "model.a": parts["a"][0], "model.b[0]": parts["b"][0][0], "model.b[1]": parts["b"][1][0],
        "model.c.d": parts["c"]["d"][0],
    }  # fmt: skip
    assert found == alone


def test_an_error_of_value_gets_the_name_of_its_node() -> None:
    node = {"_target_": f"{HERE}.fails", "kind": "value", "message": "size is 3; expected 4"}
    with pytest.raises(UsageError, match=r"^model\.text: size is 3; expected 4$") as raised:
        instantiate({"_target_": f"{HERE}.takes_more", "first": 1, "text": node}, 0, "model")
    assert isinstance(raised.value.__cause__, ValueError)
    named = {**node, "message": "model.size is 3; expected 4"}
    for kind, expected in (("value", ValueError), ("usage", UsageError)):
        with pytest.raises(expected, match=r"^model\.size is 3; expected 4$"):
            instantiate({**named, "kind": kind}, 0, "model")


def test_other_errors_of_a_target_are_passed_on() -> None:
    with pytest.raises(TypeError, match=r"^no such thing$"):
        instantiate({"_target_": f"{HERE}.fails", "kind": "type", "message": "no such thing"}, 0, "model")


def test_every_target_is_looked_up_before_any_is_called() -> None:
    """A lookup that refuses one, as that of a checkpoint's configuration, has none called."""
    called = []

    def lookup(name: Any, path: str) -> Any:
        asked.append((name, path))
        if name == "evil":
            raise UsageError(f"{path}._target_ is {name!r}; refused")
        return lambda **arguments: called.append(name) or name

    node = {"_target_": "a", "x": {"_target_": "b"}, "y": [1, {"z": {"_target_": "c", "_partial_": True}}]}
    asked: list[tuple[str, str]] = []
    resolved = resolve(node, "model", lookup)
    assert sorted(asked) == [("a", "model"), ("b", "model.x"), ("c", "model.y[1].z")] and not called
    assert call(resolved, 0) == "a"
    assert called == ["b", "a"], "the partial one is not called"
    called.clear()
    with pytest.raises(UsageError, match=r"^model\.y\[1\]\.z\._target_ is 'evil'; refused$"):
        resolve({**node, "y": [1, {"z": {"_target_": "evil"}}]}, "model", lookup)
    assert not called
