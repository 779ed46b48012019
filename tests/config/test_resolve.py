"""Comparison of runs' configurations, their file, and what comes from the environment.

The messages of wrong use are tested through the command, in test_train_command.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mmpretrain.config import resolve
from mmpretrain.config.command_line import one_line
from mmpretrain.config.resolve import differences
from mmpretrain.config.schema import register_schemas

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
