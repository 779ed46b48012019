"""Values that a configuration takes from the environment."""

import pytest
from hydra import compose, initialize_config_module

from mmpretrain.config import config_yaml, identity, resolve
from mmpretrain.config.identity import differences
from mmpretrain.config.schema import register_schemas


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
    plain, hparams = config_yaml.to_plain(cfg), identity.hparams(cfg)
    assert plain["data"]["root"] == hparams["data"] == "${oc.env:SECRET}/data"
    assert plain["init_from"] == hparams["init_from"] == "${data.root}/init"
    assert plain["optimizer"]["lr"] == hparams["lr"] == "${oc.decode:${oc.env:RATE}}"
    assert plain["data"]["val"]["val"]["templates"] == ["{} ${oc.env:SECRET}", "a {}"]
    text = config_yaml.to_yaml(plain)
    assert "geheim" not in text + str(hparams) and "0.25" not in text
    assert text.count("${") == 8, "all else is written as it is resolved"
    assert config_yaml.from_yaml(text) == plain


def test_a_run_of_the_environment_goes_on_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("data.train.pairs.caption=${oc.env:CAPTION}", "run.name=a")
    monkeypatch.setenv("CAPTION", "txt")
    first = environment_run(*overrides)
    monkeypatch.setenv("CAPTION", "json.alt")
    second = environment_run(*overrides)
    assert differences(config_yaml.to_plain(first), config_yaml.to_plain(second)) == []
    assert (
        differences(config_yaml.to_values(first), config_yaml.to_plain(first), (), config_yaml.to_values(first)) == []
    )
    changed = differences(config_yaml.to_values(first), config_yaml.to_plain(second), (), config_yaml.to_values(second))
    assert changed == ['data.train.pairs.caption: "txt" -> "${oc.env:CAPTION}"']
