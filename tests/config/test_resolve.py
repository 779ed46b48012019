"""The parts of the configuration that need no run: signatures, building, what tells one run from another.

The messages of wrong use are tested through the command, in test_train_command.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

from mmpretrain.config import resolve
from mmpretrain.config.command_line import one_line
from mmpretrain.config.instantiate import check_targets, instantiate
from mmpretrain.config.resolve import differences
from mmpretrain.config.schema import register_schemas
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


# ---------------------------------------------------------------------------------------------- identity

SAVED: dict[str, Any] = {
    "run": {"name": "a", "dir": "runs/a", "seed": 0},
    "trainer": {"duration": "4steps", "batch_size": 16, "micro_batch_size": None, "log_every": "1steps"},
    "checkpoint": {"every": "1epochs", "keep_last": 3},
    "data": {"root": "data", "workers": 2, "train": {"pairs": {"shards": "train", "caption": "txt"}}, "val": {}},
    "optimizer": {"lr": 0.001, "betas": [0.9, 0.98]},
    "eval": {"retrieval": {"every": None}},
}


def changed(**changes: Any) -> dict[str, Any]:
    """SAVED with dotted keys (`__` for the dot) changed."""
    now = OmegaConf.create(SAVED)
    for key, value in changes.items():
        OmegaConf.update(now, key.replace("__", "."), value, force_add=True, merge=False)
    plain = OmegaConf.to_container(now)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [
        {"run__name": "b", "run__dir": "elsewhere"},
        {"trainer__micro_batch_size": 4, "trainer__log_every": "5steps", "checkpoint__keep_last": 0},
        {"data__root": "moved", "data__workers": 0, "data__train__pairs__shards": ["a.tar", "b.tar"]},
        {"writer": {"wandb": {"_target_": "mmpretrain.reporting.wandb.WandB"}}},
        {"eval": {}, "data__val": {"val": {"shards": "val"}}},
        {"data__max_image_bytes": 1 << 29},  # as a run was that did not know this key
    ],
)
def test_what_may_change_is_no_difference(changes: dict[str, Any]) -> None:
    assert differences(SAVED, changed(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer__lr": 0.002}, ["optimizer.lr: 0.001 -> 0.002"]),
        ({"optimizer__betas": [0.9, 0.95]}, ["optimizer.betas: [0.9, 0.98] -> [0.9, 0.95]"]),
        ({"data__max_image_bytes": 1 << 30}, ["data.max_image_bytes: 536870912 -> 1073741824"]),
        ({"run__seed": 1, "trainer__batch_size": 8}, ["run.seed: 0 -> 1", "trainer.batch_size: 16 -> 8"]),
        ({"data__train__pairs__caption": None}, ['data.train.pairs.caption: "txt" -> null']),
        ({"objective": {"mae": {"weight": 1.0}}}, ['objective.mae.weight: "absent" -> 1.0']),
    ],
)
def test_everything_else_is_a_difference(changes: dict[str, Any], expected: list[str]) -> None:
    assert differences(SAVED, changed(**changes)) == expected


def test_duration_is_a_difference_unless_it_is_free() -> None:
    now = changed(trainer__duration="8steps")
    assert differences(SAVED, now) == ['trainer.duration: "4steps" -> "8steps"']
    assert differences(SAVED, now, free=("trainer.duration",)) == []


@pytest.mark.parametrize("experiment", ["quickstart", "emoji_clip", "grocery_clip"])
def test_configuration_comes_back_from_its_file_unchanged(experiment: str) -> None:
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", "objective=[infonce,sigmoid,mae]", "optimizer.lr=1e-3"])
    plain = resolve.to_plain(resolve.resolve(cfg))
    assert differences(resolve.from_yaml(resolve.to_yaml(plain)), plain) == []
    assert resolve.from_yaml(resolve.to_yaml(plain)) == plain
    assert "${" not in resolve.to_yaml(plain)


def environment_run(*overrides: str) -> resolve.TrainConfig:
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        return resolve.resolve(compose("train", ["experiment=quickstart", *overrides]))


def test_what_comes_from_the_environment_is_used_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "/geheim")
    monkeypatch.setenv("RATE", "0.25")
    cfg = environment_run(
        "data.root=${oc.env:SECRET}/data",
        "init_from=${data.root}/init",
        "optimizer.lr='${oc.decode:${oc.env:RATE}}'",
        "data.val.val.templates=['{} ${oc.env:SECRET}', 'a {}']",
        "objective.infonce.weight='${oc.decode:${oc.env:RATE}}'",
    )
    assert (cfg.data.root, cfg.init_from, cfg.optimizer["lr"]) == ("/geheim/data", "/geheim/data/init", 0.25)
    plain, hparams = resolve.to_plain(cfg), resolve.hparams(cfg)
    assert plain["data"]["root"] == hparams["data"] == "${oc.env:SECRET}/data"
    assert plain["init_from"] == hparams["init_from"] == "${data.root}/init"
    assert plain["optimizer"]["lr"] == hparams["lr"] == "${oc.decode:${oc.env:RATE}}"
    assert plain["data"]["val"]["val"]["templates"] == ["{} ${oc.env:SECRET}", "a {}"]
    text = resolve.to_yaml(plain)
    assert "geheim" not in text + str(hparams) and "0.25" not in text
    assert text.count("${") == 8, "all else is written as it is resolved"
    assert resolve.from_yaml(text) == plain


def test_a_run_of_the_environment_goes_on_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("data.train.pairs.caption=${oc.env:CAPTION}", "run.name=a")
    monkeypatch.setenv("CAPTION", "txt")
    first = environment_run(*overrides)
    monkeypatch.setenv("CAPTION", "json.alt")
    second = environment_run(*overrides)
    assert differences(resolve.to_plain(first), resolve.to_plain(second)) == []
    assert differences(resolve.to_values(first), resolve.to_plain(first), (), resolve.to_values(first)) == []
    changed = differences(resolve.to_values(first), resolve.to_plain(second), (), resolve.to_values(second))
    assert changed == ['data.train.pairs.caption: "txt" -> "${oc.env:CAPTION}"']


def test_file_of_others_is_read_without_following_it() -> None:
    assert resolve.from_yaml("a: ${oc.env:HOME}") == {"a": "${oc.env:HOME}"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer.batchsize=1"], "unknown configuration key 'trainer.batchsize'; did you mean 'batch_size'?"),
        (
            ["eval=[nope]"],
            "there is no eval 'nope'; expected one of: contrastive_loss, gallery, patch_similarity, projector, "
            "retrieval, zero_shot",
        ),
        (["schedule=nope"], "there is no schedule 'nope'; expected one of: constant, cosine"),
    ],
)
def test_errors_of_composition_become_one_line(overrides: list[str], line: str) -> None:
    register_schemas()
    with (
        initialize_config_module("mmpretrain.conf", version_base="1.3"),
        pytest.raises(Exception, match=r".") as raised,
    ):
        compose("train", overrides)
    assert one_line(raised.value) == line
