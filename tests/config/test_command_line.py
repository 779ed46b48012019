"""Errors of Hydra, OmegaConf and YAML in one line. Those of whole commands are tested in test_train_command.py."""

import pytest
from hydra import compose, initialize_config_module

from mmpretrain.config.command_line import one_line
from mmpretrain.config.schema import register_schemas


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer.batchsize=1"], "unknown configuration key 'trainer.batchsize'; did you mean 'batch_size'?"),
        (
            ["eval=[nope]"],
            "there is no eval 'nope'; expected one of: contrastive_loss, gallery, patch_similarity, projector, "
            "retrieval, zero_shot",
        ),
        (["schedule=nope"], "there is no schedule 'nope'; expected one of: constant, cosine, rsqrt, wsd"),
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
