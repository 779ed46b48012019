"""A warning of gradients, by the real command."""

from pathlib import Path

import pytest

from tests import runs


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_gradient_of_millions_is_said_where_nothing_clips_it(clip: str, pairs: Path, tmp_path: Path) -> None:
    weight = "objective.infonce.weight={piecewise: {0%: 0.001, 80%: 1.0e+6}}"
    settings = ("trainer.duration=40steps", f"trainer.clip_grad_norm={clip}", "eval=[]", weight)
    finished = runs.trained(tmp_path, pairs, *settings)
    said = [line for line in finished.stderr.splitlines() if "had a gradient of norm" in line]
    assert len(said) == (clip == "null")
    assert not said or "step 33 had" in said[0]
