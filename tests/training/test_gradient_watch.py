"""Gradients far beyond what is usual are said once."""

import logging
import math
from pathlib import Path

import pytest
import torch

from mmpretrain.training.gradient_watch import GradientWatch
from tests import runs


def watched(norms: list[float], every: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of norms, looked at every so many steps."""
    watch = GradientWatch()
    with caplog.at_level(logging.WARNING):
        for step, norm in enumerate(norms, start=1):
            watch.add(step, torch.tensor(norm))
            if step % every == 0:
                watch.check()
    return caplog.messages


@pytest.mark.parametrize("every", [1, 50])
def test_a_gradient_of_millions_is_named_once_with_what_is_usual(every: int, caplog: pytest.LogCaptureFixture) -> None:
    norms = (2 + 0.3 * torch.randn(400)).abs().tolist()
    norms[220] = norms[222] = norms[300] = 1e7
    (message,) = watched(norms, every, caplog)
    assert message.startswith("step 221 had a gradient of norm 1e+07, where 2")
    assert "trainer.clip_grad_norm=1.0" in message


USUAL = {
    "heavy tails": lambda: torch.distributions.StudentT(3.0).sample((2000,)).abs().tolist(),
    "falling": lambda: [100 / step for step in range(1, 500)],
    "skipped steps": lambda: [1.0] * 50 + [math.nan, math.inf] * 50,
    "a constant that doubles": lambda: [1.0] * 100 + [2.0] * 100 + [0.0] * 100,
}


@pytest.mark.parametrize("norms", USUAL)
def test_what_is_usual_is_not_said(norms: str, caplog: pytest.LogCaptureFixture) -> None:
    assert watched(USUAL[norms](), 50, caplog) == []


@pytest.mark.parametrize("clip", ["null", pytest.param("1.0", marks=pytest.mark.slow)])
def test_a_run_says_a_gradient_of_millions_where_nothing_clips_it(clip: str, pairs: Path, tmp_path: Path) -> None:
    weight = "objective.infonce.weight={piecewise: {0%: 0.001, 80%: 1.0e+6}}"
    settings = ("trainer.duration=40steps", f"trainer.clip_grad_norm={clip}", "eval=[]", weight)
    finished = runs.trained(tmp_path, pairs, *settings)
    said = [line for line in finished.stderr.splitlines() if "had a gradient of norm" in line]
    assert len(said) == (clip == "null")
    assert not said or "step 33 had" in said[0]
