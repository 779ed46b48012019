"""The model card tells what is in the run's files, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmpretrain.reporting.model_card import Subject, model_card
from tests import saved_runs

STATE = {"step": 3, "samples": 48, "wall_seconds": 60.0, "fingerprint": {"data.train.pairs": {"pairs": "abc:def"}}}
BOTH = ("image", "text")


def subject(is_average: bool = False, **changes: Any) -> Subject:
    return Subject(**{
        "source": "runs/mine", "towers": BOTH, "is_average": is_average, "library": "timm", "usage": "Like so.", **changes
    })  # fmt: skip


def evaluated(folder: Path, scores: dict[str, float], **facts: Any) -> Path:
    """A run's directory whose last step, the third, has these scores."""
    run = folder / "mine"
    folder.mkdir(exist_ok=True)
    saved_runs.save_whole_run(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), **scores})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    results = {**scores, "steps": 3, "samples": 48, "wall_seconds": 7200.0, "pairs_per_second": 9.5}
    (run / "results.json").write_text(json.dumps(results))
    (run / "run.json").write_text(json.dumps({"device": "cpu", "processes": 1, **facts}))
    return run


def rows_of(card: str, title: str) -> dict[str, list[str]]:
    """The cells of a section's tables by their first one."""
    section = re.split(r"^## ", card, flags=re.MULTILINE)
    lines = next(each for each in section if each.startswith(title)).splitlines()
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def test_every_value_is_one_of_the_run(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {"eval-val/acc1": 0.5, "eval-val-ema/acc1": 0.75})
    (run / "intervals.json").write_text(json.dumps({"eval-val/acc1": {"sample": [0.4, 0.625]}}))
    card = model_card(subject(), run, STATE)
    training = rows_of(card, "Training")
    assert training["run"] == [f"{tmp_path.name}/mine"]
    assert training["weights"] == ["as trained, after step 3"]
    assert training["length"] == ["3 steps, 48 samples, 2:00:00 h of wall time"], "with the last evaluation"
    assert training["fingerprint of data.train.pairs"] == ["pairs abc:def"]
    assert training["hardware"] == ["1 × cpu, fp32 (of the last start; those of earlier ones are not recorded)"]
    assert training["energy of the run"][0].startswith("unknown: not measured")
    scores = rows_of(card, "Scores")
    assert scores["eval-val/acc1"] == ["0.5000", "0.400–0.625"] and "eval-val-ema/acc1" not in scores
    assert "Training samples that were refused in the run: 1\n\n- 1 × no readable image\n" in card
    assert "## How to load it\n\nLike so.\n" in card
    assert (run / "config.yaml").read_text().rstrip() in card
    average = model_card(subject(is_average=True), run, STATE)
    assert rows_of(average, "Training")["weights"] == ["moving average, after step 3"]
    assert rows_of(average, "Scores")["eval-val-ema/acc1"][0] == "0.7500"


def test_an_earlier_checkpoint_has_no_scores_of_a_later_one(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {"eval-val/acc1": 0.5})
    card = model_card(subject(), run, {**STATE, "step": 2, "samples": 32})
    assert "Not evaluated in training after step 2." in card and "acc1" not in card.partition("## Configuration")[0]
    assert rows_of(card, "Training")["length"] == ["2 steps, 32 samples, 0:01:00 h of wall time"]


def test_limits_are_those_that_evaluators_measured(tmp_path: Path) -> None:
    found = {
        "eval-val/group_acc1_gap": 0.25, "eval-val/worst_group_acc1": 0.25, "eval-val/ece": 0.125,
        "eval-val/modality_gap": 0.5, "eval-val/acc1": 0.5,
    }  # fmt: skip
    card = model_card(subject(), evaluated(tmp_path, found), STATE)
    limits, scores = rows_of(card, "Limits and biases"), rows_of(card, "Scores")
    assert {name: float(limits[name][0]) for name in limits if name.startswith("eval-")} == {
        name: value for name, value in found.items() if name != "eval-val/acc1"
    }
    assert [name for name in scores if name.startswith("eval-")] == ["eval-val/acc1"]
    bare = model_card(subject(), evaluated(tmp_path / "other", {"eval-val/acc1": 0.5}), STATE)
    for evaluator in ("fairness", "calibration", "geometry"):
        assert f"not measured for these weights (`eval={evaluator}`)" in bare


def test_energy_is_measured_or_estimated_and_says_which(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, device="NVIDIA H100 80GB HBM3", processes=8)
    estimated = rows_of(model_card(subject(), run, STATE), "Training")["energy of the run"][0]
    assert estimated.startswith("11.2 kWh, estimated: 8 × 700 W"), "of two hours"
    (run / "energy.json").write_text(json.dumps({"kwh": 1.5, "seconds": 7200, "by": "codecarbon 3"}))
    measured = rows_of(model_card(subject(), run, STATE), "Training")["energy of the run"][0]
    assert measured.startswith("1.5 kWh in 2 h, measured by codecarbon 3")
    (run / "energy.json").write_text(json.dumps({"kwh": "much", "seconds": 7200, "by": "codecarbon 3"}))
    with pytest.raises(ValueError, match=r"energy\.json holds .* expected kwh, seconds and by"):
        model_card(subject(), run, STATE)


@pytest.mark.parametrize(
    ("towers", "task"),
    [
        (BOTH, "zero-shot-image-classification"),
        (("image",), "image-feature-extraction"),
        (("text",), "feature-extraction"),
    ],
)
def test_the_head_is_what_the_hub_reads(towers: tuple[str, ...], task: str, tmp_path: Path) -> None:
    card = model_card(subject(towers=towers), evaluated(tmp_path, {}), STATE)
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": ["mmpretrain"],
    }
    alone = model_card(subject(towers=towers, library=None, usage=None), evaluated(tmp_path / "other", {}), STATE)
    assert "library_name" not in alone.split("---")[1] and "How to load it" not in alone


def test_weights_of_others_have_no_training(tmp_path: Path) -> None:
    card = model_card(subject(source="timm:resnet18@weights.pt"), None, {})
    assert "Weights of another library, `timm:resnet18@weights.pt`. Their training and scores are unknown here." in card
    assert "## Training" not in card and "## Scores" not in card


def test_texts_of_a_run_break_no_table(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, device="a | <b>\nc")
    with (run / "config.yaml").open("a") as file:
        file.write("extra: '```'\n")
    card = model_card(subject(), run, STATE)
    assert rows_of(card, "Training")["hardware"][0].startswith("1 × a \\| &lt;b&gt;\\nc, fp32")
    assert "\n````yaml\n" in card and card.count("\n````\n") == 1
