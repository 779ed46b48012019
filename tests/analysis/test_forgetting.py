"""Forgetting between runs: the table against arithmetic done by hand."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.forgetting import Pair, pairs_of, table
from analysis.runs import Run, find_runs
from tests import runs as commands
from tests.analysis.test_compare import write_run

OLD, NEW = "eval-val/acc1", "eval-new/acc1"
BEFORE = [0.8, 0.7, 0.9]
AFTER = {"plain": [0.3, 0.4, 0.2], "replay": [0.7, 0.65, 0.75]}


def write_intervals(folder: Path, metric: str, low: float, high: float) -> None:
    (folder / "intervals.json").write_text(json.dumps({metric: {"sample": [low, high]}}))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three first runs, and two settings that began with each of them, named as on the command line."""
    monkeypatch.chdir(tmp_path)
    for seed, before in enumerate(BEFORE):
        first = tmp_path / "first" / f"run.seed={seed}"
        write_run(first, seed, {"init_from": None}, {OLD: before})
        write_intervals(first, OLD, before - 0.1, before + 0.05)
        for setting, scores in AFTER.items():
            checkpoint = "/checkpoints/step_00000004" if setting == "replay" else ""
            settings: dict[str, Any] = {
                "init_from": f"first/run.seed={seed}{checkpoint}",
                "objective": {setting: {"_target_": f"x.{setting}"}},
            }
            folder = tmp_path / "second" / f"{setting},run.seed={seed}"
            write_run(folder, seed, settings, {OLD: scores[seed], NEW: 0.5 + scores[seed] / 10})
            write_intervals(folder, OLD, scores[seed] - 0.03, scores[seed] + 0.02)
    return tmp_path / "second"


def test_scores_are_paired_with_those_of_the_run_that_each_began_with(runs: Path) -> None:
    rows = table(pairs_of(find_runs([runs])))
    assert [(row.metric, row.setting) for row in rows] == [
        (OLD, "replay"), (OLD, "plain"), (NEW, "replay"), (NEW, "plain"),
    ]  # fmt: skip
    for row in rows[:2]:
        after = AFTER[row.setting]
        differences = [a - b for a, b in zip(after, BEFORE, strict=True)]
        mean = statistics.mean(differences)
        assert row.differences == pytest.approx(differences)
        below, above = math.hypot(0.03, 0.05), math.hypot(0.02, 0.1)
        assert row.interval == pytest.approx((mean - below, mean + above))
        assert row.cells()[:3] == [OLD, row.setting, "3"]
        assert row.cells()[5] == f"{mean:+.4f} ± {statistics.stdev(differences):.4f}"
    assert rows[2].cells()[3:] == ["-", "0.5700 ± 0.0050", "-", "-"]


def test_an_interval_of_a_difference_is_that_of_draws_of_both_scores(tmp_path: Path) -> None:
    scores, deviations = (0.6, 0.5), (0.03, 0.04)
    made = []
    for k, (score, deviation) in enumerate(zip(scores, deviations, strict=True)):
        (tmp_path / str(k)).mkdir()
        write_intervals(tmp_path / str(k), OLD, score - 1.96 * deviation, score + 1.96 * deviation)
        made.append(Run(tmp_path / str(k), {"run.seed": 0}, {OLD: score}))
    rng = np.random.default_rng(0)
    before, after = (rng.normal(*each, 400_000) for each in zip(scores, deviations, strict=True))
    (row,) = table([Pair(*made)])
    assert row.interval == pytest.approx(np.percentile(after - before, [2.5, 97.5]), abs=1e-3)


def test_the_command_prints_writes_and_draws(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--markdown", str(tmp_path / "table.md"), "--curves", str(tmp_path / "curves.png")]
    assert main(["forgetting", str(runs), "--metric", OLD, *out]) == 0
    printed = capsys.readouterr().out
    assert "6 runs" in printed and "-0.1000" in printed and NEW not in printed
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| metric | setting | seeds |") and len(lines) == 4
    assert lines[2].startswith(f"| {OLD} | replay | 3 | 0.8000 ± 0.1000 | 0.7000 ± 0.0500 | -0.1000 ± ")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["first"], "no run is finished and began with the weights of another run; expected runs with init_from=RUN"),
        (
            ["second", "--metric", "eval-val/acc9"],
            "no run has 'eval-val/acc9'; they have: eval-val/acc1, eval-new/acc1",
        ),
        (["lost"], "gone is not a run, since it has no config.yaml"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], told: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "lost" / "a", 0, {"init_from": "gone"}, {OLD: 0.5})
    assert main(["forgetting", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


@pytest.mark.slow
def test_a_run_that_goes_on_with_replay_and_distillation_is_compared_with_its_first(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment continual_clip, on two sets that are the same here."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("emoji", "grocery"):
        (data / name).symlink_to(pairs)
    commands.trained(tmp_path, pairs, "trainer.duration=2steps", "run.dir=first")
    settings = (
        "experiment=continual_clip", "init_from=first", "objective=[infonce,distillation]", "trainer.duration=3steps",
        "data.val.new={shards: grocery/val, label: null, classes: null, text_column: null}", "run.dir=second",
    )  # fmt: skip
    commands.trained(tmp_path, data, *settings)
    assert main(["forgetting", str(tmp_path / "second")]) == 2, "init_from is relative to the folder of the run"
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["forgetting", "second"]) == 0
    assert "eval-val/image_retrieval_recall@1" in capsys.readouterr().out
