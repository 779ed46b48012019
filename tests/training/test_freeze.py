"""`trainer.freeze`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import runs


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parts_wait_for_their_turn(world_size: int, pairs: Path, tmp_path: Path) -> None:
    finished = runs.train_group(
        tmp_path, world_size, f"data.root={pairs}", "trainer.duration=6steps", "checkpoint.every=1steps",
        "checkpoint.keep_last=0", "trainer.freeze={image.trunk.pos_embed: null, text: 4steps}",
    )  # fmt: skip
    assert [each.code for each in finished] == [0] * world_size, finished[0].stderr
    for step in range(1, 6):
        moved = changed(runs.weights(tmp_path / "run", step), runs.weights(tmp_path / "run", step + 1))
        assert "model.image.trunk.pos_embed" not in moved
        assert "model.image.trunk.patch_embed.proj.weight" in moved
        assert ("model.text.positional_embedding" in moved) == (step >= 4), step


def test_a_locked_tower_is_trained_against_as_it_is(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=3steps", "checkpoint.every=1steps", "trainer.freeze={image: null}")
    runs.trained(tmp_path, pairs, *settings)
    moved = changed(runs.weights(tmp_path / "run", 1), runs.weights(tmp_path / "run", 3))
    assert not any(name.startswith("model.image.") for name in moved)
    assert {"model.image_projection.weight", "model.text.token_embedding.weight"} <= moved


def test_what_thaws_is_what_an_objective_reaches(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.freeze={image: 1steps, text: 1steps}", "objective=[mae]", *runs.TINY_MAE, "eval=[]")
    runs.trained(tmp_path, pairs, "trainer.duration=3steps", "checkpoint.every=1steps", *settings)
    moved = changed(runs.weights(tmp_path / "run", 1), runs.weights(tmp_path / "run", 3))
    assert any(name.startswith("model.image.") for name in moved)
    assert not any(name.startswith("model.text.") for name in moved)


def test_a_part_that_is_not_there_is_told(pairs: Path, tmp_path: Path) -> None:
    finished = runs.trained(tmp_path, pairs, "trainer.duration=1steps", "trainer.freeze={imag: null}", code=2)
    assert finished.stderr == (
        "error: trainer.freeze has 'imag', which is no part of the model; did you mean 'image'?\n"
    )


def test_a_model_that_is_frozen_as_a_whole_is_told(pairs: Path, tmp_path: Path) -> None:
    parts = "{image: null, text: null, image_projection: null, text_projection: null}"
    finished = runs.trained(tmp_path, pairs, "trainer.duration=1steps", f"trainer.freeze={parts}", "eval=[]")
    assert "no parameter of the model is trained, only objectives.infonce.logit_scale; if" in finished.stderr
