"""Scores along interpolated checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.interpolation import read_points

X, Y = "eval-new/acc1", "eval-val/acc1"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for seed in (0, 1):
        for alpha in ("0", "0.5", "1"):
            folder = tmp_path / f"seed{seed}" / f"alpha_{alpha}"
            folder.mkdir(parents=True)
            scores = {X: float(alpha) / 2 + seed / 10, Y: 0.9 - float(alpha) / 3, "samples": 4, "intervals": {}}
            (folder / "scores.json").write_text(json.dumps(scores))
    return [tmp_path / "seed0", tmp_path / "seed1"]


def test_points_are_in_the_order_of_the_shares(folders: list[Path]) -> None:
    points = read_points(folders, X, Y)
    assert [point.alpha for point in points] == [0, 0.5, 1]
    assert points[1].x == [0.25, 0.35] and points[2].y == pytest.approx([0.9 - 1 / 3] * 2)


def test_the_command_prints_and_draws(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["interpolation", *map(str, folders), "--x", X, "--y", Y, "--curve", str(tmp_path / "curve.png")]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "2 folders" in out and "0.3000 ± 0.0707" in out
    with Image.open(tmp_path / "curve.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5


def test_what_is_missing_is_told_in_one_line(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*given: str) -> str:
        assert main(["interpolation", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    both = [str(folder) for folder in folders]
    assert f"has no 'acc'; it has: {X}, {Y}" in told(*both, "--x", "acc", "--y", Y)
    assert "has the shares none; expected alpha_<share>" in told(str(tmp_path), "--x", X, "--y", Y)
    (folders[1] / "alpha_0.5" / "scores.json").unlink()
    assert "scores.json is missing; write it: python -m mmpretrain.evaluate" in told(*both, "--x", X, "--y", Y)
    (folders[1] / "alpha_0.5").rmdir()
    assert "has the shares 0, 1; expected" in told(*both, "--x", X, "--y", Y)
