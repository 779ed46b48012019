"""The file that holds a run's configuration is read back as it was written."""

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mmpretrain.config import config_yaml, resolve
from mmpretrain.config.identity import differences
from mmpretrain.config.schema import register_schemas


@pytest.mark.parametrize("experiment", ["quickstart", "emoji_clip", "grocery_clip"])
def test_configuration_comes_back_from_its_file_unchanged(experiment: str) -> None:
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", "objective=[infonce,sigmoid,mae]", "optimizer.lr=1e-3"])
    resolved = resolve.resolve(cfg)
    plain = config_yaml.to_plain(resolved)
    assert plain == OmegaConf.to_container(OmegaConf.structured(resolved), enum_to_str=True)
    assert differences(config_yaml.from_yaml(config_yaml.to_yaml(plain)), plain) == []
    assert config_yaml.from_yaml(config_yaml.to_yaml(plain)) == plain
    assert "${" not in config_yaml.to_yaml(plain)


def test_file_of_others_is_read_without_following_it() -> None:
    assert config_yaml.from_yaml("a: ${oc.env:HOME}") == {"a": "${oc.env:HOME}"}
