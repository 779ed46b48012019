"""Scores that `mmpretrain.evaluate` leaves in a run's directory."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.data.source import SampleSource
from mmpretrain.reporting.evaluations import Weights, keep, read
from mmpretrain.scores import Score
from tests.evals.held_out import NUM_SAMPLES, make_set

WEIGHTS = Weights("step_00000005", "abc", is_average=False)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, SampleSource]:
    return {"val": make_set(tmp_path).shards}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_scores_are_merged_by_metric_in_a_file_for_each_weights(run: Path, sources: dict[str, SampleSource]) -> None:
    average = replace(WEIGHTS, is_average=True)
    keep(run, WEIGHTS, {"eval-val/a": Score(1.0, {"sample": (0.5, 1.5)}), "eval-val/b": Score(2.0)}, sources, "bf16")
    keep(run, WEIGHTS, {"eval-val/b": Score(float("inf"))}, sources, "fp32")
    keep(run, average, {"eval-val/a": Score(4.0)}, sources, "bf16")
    found = read(run, WEIGHTS)
    assert {name: (each.value, each.precision) for name, each in found.items()} == {
        "eval-val/a": (1.0, "bf16"),
        "eval-val/b": (None, "fp32"),
    }
    first = found["eval-val/a"]
    assert (first.intervals, first.samples) == ({"sample": (0.5, 1.5)}, NUM_SAMPLES)
    assert first.fingerprint == sources["val"].fingerprint.partition(":")[0]
    assert {name: each.value for name, each in read(run, average).items()} == {"eval-val-ema/a": 4.0}
    names = {file.name for file in (run / "evaluations").iterdir()}
    assert names == {".lock", "step_00000005.json", "step_00000005-ema.json"}


def test_scores_of_other_weights_of_the_same_step_are_replaced(run: Path, sources: dict[str, SampleSource]) -> None:
    anew = replace(WEIGHTS, manifest="def")
    keep(run, WEIGHTS, {"eval-val/a": Score(1.0), "eval-val/b": Score(2.0)}, sources, "fp32")
    assert read(run, anew) == {}
    keep(run, anew, {"eval-val/a": Score(3.0)}, sources, "fp32")
    assert {name: each.value for name, each in read(run, anew).items()} == {"eval-val/a": 3.0}
    assert read(run, WEIGHTS) == {}


def a_file(run: Path) -> None:
    (run / "evaluations").touch()


def a_link(run: Path) -> None:
    (run.parent / "elsewhere").mkdir()
    (run / "evaluations").symlink_to(run.parent / "elsewhere")


def a_link_within(run: Path) -> None:
    (run / "evaluations").mkdir()
    (run / "evaluations" / ".partial-step_00000005.json").symlink_to(run.parent / "elsewhere")


def another_content(run: Path) -> None:
    (run / "evaluations").mkdir()
    (run / "evaluations" / "step_00000005.json").write_text("[]")


@pytest.mark.parametrize("prepare", [a_file, a_link, a_link_within, another_content])
def test_what_cannot_be_written_is_one_warning(
    prepare: Callable[[Path], None], run: Path, sources: dict[str, SampleSource], caplog: pytest.LogCaptureFixture
) -> None:
    prepare(run)
    before = sorted(run.parent.rglob("*"))
    keep(run, WEIGHTS, {"eval-val/a": Score(1.0)}, sources, "fp32")
    (record,) = [each for each in caplog.records if each.name == "mmpretrain.reporting.evaluations"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the scores are not kept for the model card: ")
    assert str(run / "evaluations") in record.getMessage()
    after = [path for path in sorted(run.parent.rglob("*")) if path.name != ".lock"]
    assert after == before, "nothing is written through a link"


ENTRY = {"value": 0.5, "intervals": {"sample": [0.25, 0.75]}, "samples": 4, "fingerprint": "abc", "precision": "fp32"}


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        ({**ENTRY, "value": "![a](b)"}, "'eval-val/a' lacks value"),
        ({**ENTRY, "value": True}, "'eval-val/a' is bool; expected a number or null"),
        ({**ENTRY, "value": float("nan")}, "'eval-val/a' is nan"),
        ({**ENTRY, "samples": -1}, "'eval-val/a' lacks value, intervals, samples"),
        ({**ENTRY, "samples": 10**400}, "'eval-val/a' lacks value, intervals, samples"),
        ({**ENTRY, "fingerprint": 1}, "'eval-val/a' lacks"),
        ({**ENTRY, "further": 1}, "'eval-val/a' lacks"),
        ({**ENTRY, "intervals": {"sample": [1]}}, "the interval of 'eval-val/a' is no pair of numbers"),
        ({**ENTRY, "intervals": {"sample": [None, 1]}}, "the interval of 'eval-val/a' is no pair of numbers"),
        ({**ENTRY, "intervals": {"sample": ["a", 1]}}, "'eval-val/a: sample, low' is a; expected a number"),
        ({**ENTRY, "intervals": {"sample": [1, float("inf")]}}, "'eval-val/a: sample, high' is inf"),
        ([], "'eval-val/a' lacks"),
        (None, "has no scores"),
    ],
)
def test_a_file_of_others_is_checked(entry: Any, fragment: str, run: Path) -> None:
    (run / "evaluations").mkdir()
    path = run / "evaluations" / "step_00000005.json"
    scores = None if entry is None else {"eval-val/a": entry}
    path.write_text(json.dumps({"manifest": "abc", "scores": scores}))
    with pytest.raises(ValueError, match="evaluations") as error:
        read(run, WEIGHTS)
    assert str(error.value).startswith(str(path)) and fragment in str(error.value)
