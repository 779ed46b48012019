"""fp16 with loss scaling."""

import json
from pathlib import Path

import pytest
import torch

from mmpretrain.training.precision import LossScale
from tests import runs


def test_fp16_trains_close_to_fp32(pairs: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        folder.mkdir()
        runs.trained(folder, pairs, "trainer.duration=8steps", f"trainer.precision={precision}")
        losses[precision] = [record["train/loss"] for record in runs.records(folder / "run")]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] != losses["fp32"]
    state = json.loads((runs.checkpoints(tmp_path / "fp16" / "run")[-1] / "state.json").read_text())
    assert state["loss_scale"] == 2.0**16
    assert state["good_steps"] == 8


def test_loss_scale_halves_at_a_bad_step_and_doubles_after_many_good_ones() -> None:
    scale = LossScale("fp16", torch.device("cpu"), None, 1998)
    gradients = [torch.full((3,), 2.0**17)]
    scale.unscale(gradients)
    assert gradients[0].tolist() == [2.0] * 3
    scale.update(torch.tensor(3.0))
    scale.update(torch.tensor(3.0))
    assert scale.state() == (2.0**17, 0)
    scale.update(torch.tensor(torch.inf))
    assert scale.state() == (2.0**16, 0)
    idle = LossScale("bf16", torch.device("cpu"), None, 0)
    idle.unscale(gradients)
    assert idle.scale is None and gradients[0].tolist() == [2.0] * 3
