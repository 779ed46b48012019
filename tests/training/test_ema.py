"""Averaged weights."""

from pathlib import Path

import pytest
import torch

from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.schedules import ScheduledValue, TrainingProgress
from mmpretrain.training.ema import EMA
from tests import runs, tiny


def test_average_is_that_of_every_steps_weights(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=4steps", "checkpoint.every=1steps", "checkpoint.keep_last=0", "trainer.ema_decay=0.7")
    runs.trained(tmp_path, pairs, *settings)
    average = runs.weights(tmp_path / "run", 1, "ema")
    for step in (2, 3, 4):
        own = runs.weights(tmp_path / "run", step)
        average = {name: value * 0.7 + own[name] * 0.3 for name, value in average.items()}
        for name, value in runs.weights(tmp_path / "run", step, "ema").items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    results = runs.results(tmp_path / "run")
    assert "eval-val-ema/image_retrieval_recall@1" in results
    raw, averaged = (load_checkpoint(tmp_path / "run", ema=ema).model.state_dict() for ema in (False, True))
    name = "image_projection.weight"
    assert torch.equal(raw[name], runs.weights(tmp_path / "run", 4)[f"model.{name}"])
    assert torch.equal(averaged[name], runs.weights(tmp_path / "run", 4, "ema")[f"model.{name}"])


def test_a_skipped_step_leaves_the_average_as_it_is() -> None:
    model = tiny.image_text()
    average = EMA(model, ScheduledValue(0.9, "x"))
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with torch.no_grad():
        model.image_projection.weight.add_(1.0)  # type: ignore[union-attr]
    average.update(TrainingProgress(), torch.tensor(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.tensors.items())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_run_without_average_refuses_to_give_one(pairs: Path, tmp_path: Path) -> None:
    runs.trained(tmp_path, pairs, "trainer.duration=1steps")
    with pytest.raises(ValueError, match=r"has no averaged weights; expected a run with trainer\.ema_decay"):
        load_checkpoint(tmp_path / "run", ema=True)
