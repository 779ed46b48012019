"""What tells one run from another."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from mmpretrain.config.identity import differences

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
