"""Distillation: squared distances to the initial weights' embeddings, computed with torch's own layers."""

from pathlib import Path

import pytest
import torch

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.distillation import Distillation
from mmpretrain.training.task import Encodings, Task
from tests import runs, tiny
from tests.objectives.references import embeddings


def test_loss_is_the_squared_distance_to_the_embeddings_before() -> None:
    model = tiny.image_text().double()
    objective = Distillation(model)
    batch = tiny.batch([3, 9, 5, 14, 7])
    before = embeddings(model, batch)
    assert objective.loss(Encodings(model, batch)).item() == pytest.approx(0, abs=1e-20)
    tiny.randomize(model)
    after = embeddings(model, batch)
    expected = sum((new - old).square().sum().item() for new, old in zip(after, before, strict=True))
    assert expected > 0.1
    assert objective.loss(Encodings(model, batch)).item() == pytest.approx(expected, rel=1e-12)
    assert objective.count(batch) == 5
    objective.after_init(model)
    assert objective.loss(Encodings(model, batch)).item() == pytest.approx(0, abs=1e-20)


def test_the_teacher_gets_no_gradient_and_never_drops_out() -> None:
    model = ImageTextModel(tiny.vit(), tiny.text(dropout=0.5), embed_dim=12)
    task = Task(model, {"distillation": (objective := Distillation(model))}).train()
    assert model.training and not any(module.training for module in objective.teacher.modules())
    tiny.randomize(model)
    objective.loss(Encodings(model, tiny.batch([3, 9]))).backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == name.startswith("model."), name
        assert parameter.requires_grad or parameter.grad is None


@pytest.mark.parametrize("parts", [{"image": None}, {"text": None}])
def test_a_model_of_one_encoder_is_refused(parts: dict[str, None]) -> None:
    model = ImageTextModel(**{"image": tiny.vit(), "text": tiny.text(), "embed_dim": 12, **parts})
    with pytest.raises(ValueError, match=r"^objective\.keep needs a model with an image and a text encoder"):
        Distillation(model, config_path="objective.keep")


@pytest.mark.slow
def test_a_run_is_held_to_the_weights_of_init_from_and_resumes_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    for folder in (first, whole, cut):
        folder.mkdir()
    runs.trained(first, pairs, "trainer.duration=2steps", "run.seed=5")
    settings = (
        f"init_from={first / 'run'}", "objective=[infonce,distillation]", "schedule=constant", "checkpoint.every=2steps",
    )  # fmt: skip
    runs.trained(whole, pairs, *settings, "trainer.duration=4steps")
    begun, ended = runs.weights(first / "run", 2), runs.weights(whole / "run", 4)
    for name, tensor in begun.items():
        if name.startswith("model."):
            assert torch.equal(ended[f"objectives.distillation.teacher.{name.removeprefix('model.')}"], tensor)
    losses = [record["train/distillation_loss"] for record in runs.records(whole / "run")]
    assert losses[0] == pytest.approx(0, abs=1e-9) and losses[-1] > 1e-6
    for duration in (2, 4):
        runs.trained(cut, pairs, *settings, f"trainer.duration={duration}steps")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert runs.tensors(cut / "run", file) == runs.tensors(whole / "run", file)
