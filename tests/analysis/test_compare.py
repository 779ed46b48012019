"""Runs beside each other: the table against arithmetic done by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from analysis.__main__ import main
from analysis.compare import table
from analysis.runs import find_runs, read_run

METRIC = "eval-val/acc1"
SCORES = {"infonce": [0.5, 0.6, 0.8], "sigmoid": [0.7, 0.65, 0.75]}


def write_run(folder: Path, seed: int, settings: dict[str, Any], results: dict[str, float] | None) -> None:
    folder.mkdir(parents=True)
    plain = {"run": {"name": folder.name, "dir": str(folder), "seed": seed}, "data": {"workers": seed}, **settings}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(plain))
    records = [
        {"step": step, "samples": 16 * step, "train/loss": 3 / step, "system/wall_seconds": step * (1.0 + seed)}
        for step in range(1, 5)
    ]
    if results is not None:
        records[-1] |= results
        (folder / "results.json").write_text(json.dumps({**results, "steps": 4, "pairs_per_second": 100.0 + seed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for objective, scores in SCORES.items():
        for seed, score in enumerate(scores):
            settings = {"objective": {objective: {"_target_": f"x.{objective}", "weight": 1.0}}}
            results = {METRIC: score, "eval-val/contrastive_loss": 1 - score}
            write_run(tmp_path / "runs" / f"objective={objective},run.seed={seed}", seed, settings, results)
    settings = {"objective": {"infonce": {"_target_": "x.infonce", "weight": 1.0}}}
    write_run(tmp_path / "runs" / "objective=infonce,run.seed=3", 3, settings, None)
    return tmp_path / "runs"


def test_table_is_the_mean_and_sample_deviation_over_seeds_best_first(runs: Path) -> None:
    metric, metrics, rows = table(find_runs([runs]), None)
    assert metric == METRIC
    assert metrics == [METRIC, "eval-val/contrastive_loss", "pairs_per_second"]
    assert [row.name for row in rows] == ["objective=sigmoid", "objective=infonce"]
    for row in rows:
        scores = SCORES[row.name.partition("=")[2]]
        mean = sum(scores) / 3
        deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
        assert row.mean(METRIC) == pytest.approx(mean, rel=1e-12)
        assert row.deviation(METRIC) == pytest.approx(deviation, rel=1e-12)
        assert row.cell(METRIC) == f"{mean:.4f} ± {deviation:.4f}"
        assert row.num_seeds == 3
    assert [row.num_unfinished for row in rows] == [0, 1]


def test_a_seed_counts_once(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"objective": {"sigmoid": {"_target_": "x.sigmoid", "weight": 1.0}}}
    write_run(runs / "again", 2, settings, {METRIC: 0.9})
    row = next(row for row in table(find_runs([runs]), None)[2] if "sigmoid" in row.name)
    assert row.num_seeds == 3
    assert "have the same seed" in caplog.text


def test_less_of_a_loss_is_better(runs: Path) -> None:
    _, metrics, rows = table(find_runs([runs]), "eval-val/contrastive_loss")
    assert metrics[0] == "eval-val/contrastive_loss"
    assert [row.name for row in rows] == ["objective=sigmoid", "objective=infonce"]


def test_settings_of_one_name_stay_apart(tmp_path: Path) -> None:
    for experiment, lr in (("a", 1.0), ("b", 2.0)):
        write_run(tmp_path / experiment / "default", 0, {"optimizer": {"lr": lr}}, {METRIC: lr})
    _, _, rows = table(find_runs([tmp_path]), None)
    assert [row.name for row in rows] == ["b/default", "default"]


def test_command_prints_the_table_and_draws_curves(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compare", str(runs), "--curves", str(tmp_path / "curves.png")]) == 0
    out = capsys.readouterr().out
    assert out.index("objective=sigmoid") < out.index("objective=infonce")
    assert "0.7000 ± 0.0500" in out
    assert "3 (+1 unfinished)" in out
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5


def test_curves_lie_over_samples_and_over_wall_time(runs: Path) -> None:
    run = read_run(runs / "objective=sigmoid,run.seed=1")
    assert run.curve("train/loss", "samples") == [(16.0, 3.0), (32.0, 1.5), (48.0, 1.0), (64.0, 0.75)]
    assert run.curve("train/loss", "wall_seconds") == [(2.0, 3.0), (4.0, 1.5), (6.0, 1.0), (8.0, 0.75)]
    assert run.curve("nothing", "samples") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nowhere"], "no run in nowhere"),
        (["compare", "RUNS", "--metric", "eval-val/acc9"], "no run has 'eval-val/acc9'; they have: eval-val/acc1"),
        (["compare"], "Missing argument"),
        (["compaer"], "compaer"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("RUNS", str(runs)) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_runs_whose_names_are_cut_are_named_by_what_differs(tmp_path: Path) -> None:
    for number, (lr, seed) in enumerate([(1e-3, 0), (1e-3, 1), (3e-3, 0)]):
        settings = {"optimizer": {"lr": lr}, "data": {"workers": 0, "root": "far/away"}}
        write_run(tmp_path / f"data.root=far_away,data.train-{number:08x}", seed, settings, {METRIC: 0.5 - lr})
    _, _, rows = table(find_runs([tmp_path]), None)
    assert [(row.name, row.num_seeds) for row in rows] == [("optimizer.lr=0.001", 2), ("optimizer.lr=0.003", 1)]
