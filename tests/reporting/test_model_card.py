"""The model card tells what is in the run's files, and nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from mmpretrain.config import config_yaml
from mmpretrain.reporting import evaluations
from mmpretrain.reporting.evaluations import Weights
from mmpretrain.reporting.model_card import Subject, model_card
from mmpretrain.scores import Score
from tests import saved_runs
from tests.evals.held_out import NUM_SAMPLES, make_set

STATE = {"step": 3, "samples": 48, "wall_seconds": 60.0, "fingerprint": {"data.train.pairs": {"pairs": "abc:def"}}}
BOTH = ("image", "text")
BLOCKS = (
    "heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td", "bullet_list", "list_item"
)  # fmt: skip
TRAINED = Weights("step_00000003", "abc", is_average=False)


def subject(is_average: bool = False, **changes: Any) -> Subject:
    return Subject(**{
        "source": "runs/mine", "towers": BOTH, "weights": replace(TRAINED, is_average=is_average),
        "parameters": {"image": 1200, "text": 34}, "library": "timm", "usage": "Like so.", **changes
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
    return {first.strip("`"): rest for first, *rest in cells}


def measured(run: Path, scores: dict[str, Score], weights: Weights = TRAINED, precision: str = "bf16") -> None:
    """Leave scores of the data set `val` in the run's directory, as an evaluation after training does."""
    evaluations.keep(run, weights, scores, {"val": make_set(run).shards}, precision)


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
    assert "Not evaluated after step 2." in card and "acc1" not in card.partition("## Configuration")[0]
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
    card = model_card(subject(source="timm:resnet18@weights.pt", weights=None), Path("timm:resnet18@weights.pt"), {})
    assert "Weights of another library, `timm:resnet18@weights.pt`. Their training and scores are unknown here." in card
    assert "## Training" not in card and "## Scores" not in card


def test_texts_of_a_run_break_no_table(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, device="a | <b>\nc")
    with (run / "config.yaml").open("a") as file:
        file.write("extra: '```'\n")
    card = model_card(subject(), run, STATE)
    assert rows_of(card, "Training")["hardware"][0].startswith(r"1 × a \| &lt;b&gt;\\nc, fp32")
    assert "\n````yaml\n" in card and card.count("\n````\n") == 1


def test_scores_measured_after_training_are_shown_with_their_data(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {"eval-val/acc1": 0.5, "eval-val/acc5": 0.75, "eval-val-ema/acc1": 0.625})
    (run / "intervals.json").write_text(json.dumps({"eval-val/acc1": {"class": [0.1, 0.9]}}))
    measured(run, {"eval-val/acc1": Score(0.25, {"sample": (0.125, 0.375)}), "eval-val/ece": Score(0.0625)})
    measured(run, {"eval-val/modality_gap": Score(float("nan"))}, precision="fp32")
    card = model_card(subject(), run, STATE)
    scores, limits = rows_of(card, "Scores"), rows_of(card, "Limits and biases")
    assert scores["eval-val/acc1"] == ["0.2500", "0.125–0.375"], "and no interval of the score that it replaces"
    assert scores["eval-val/acc5"] == ["0.7500"] and "eval-val/ece" not in scores
    assert limits["eval-val/ece"] == ["0.0625"] and limits["eval-val/modality_gap"] == ["-"]
    told = [line for line in card.splitlines() if line.startswith("- `eval-val`: ")]
    fingerprint = make_set(run).shards.fingerprint.partition(":")[0]
    assert told == [
        f"- `eval-val`: {metrics}; {NUM_SAMPLES} samples with the fingerprint `{fingerprint}`, in {precision}"
        for metrics, precision in (("`acc1`, `ece`", "bf16"), ("`modality_gap`", "fp32"))
    ]


def test_limits_alone_are_not_called_unevaluated(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {})
    measured(run, {"eval-val/ece": Score(0.0625)})
    card = model_card(subject(), run, STATE)
    assert "## Scores\n\nSee limits and biases.\n" in card and "Not evaluated" not in card


def test_scores_of_other_weights_are_not_shown(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {"eval-val-ema/acc1": 0.625, "eval-val-ema/acc5": 0.75})
    average = replace(TRAINED, is_average=True)
    measured(run, {"eval-val/acc1": Score(0.25)}, average)
    measured(run, {"eval-val/acc1": Score(0.125)}, replace(TRAINED, manifest="of before a rollback"))
    trained = model_card(subject(), run, STATE)
    assert "Not evaluated after step 3." in trained and "Measured after training" not in trained
    scores = rows_of(model_card(subject(is_average=True), run, STATE), "Scores")
    assert {name: scores[name] for name in scores if name.startswith("eval-")} == {
        "eval-val-ema/acc1": ["0.2500"],
        "eval-val-ema/acc5": ["0.7500"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "![pix](http://evil.example/a.png)", "[a](http://evil.example)", "<http://evil.example>", "**a** __b__ _c_ ~~d~~",
        "`a`", "``a``", r"\[a](b)", r"a \| b", "a | b", "<img src=x>", "&lt;b&gt;", "$x$", "http://evil.example", "# a #",
        "a\n\n# b", "www.evil.example",
    ],
)  # fmt: skip
def test_texts_of_a_run_are_shown_as_they_are(text: str, tmp_path: Path) -> None:
    name = text.replace("/", ":").replace("\n", " ")
    folder = tmp_path / name
    folder.mkdir()
    run = evaluated(folder, {f"eval-{text}": 0.5}, device=text, processes=1)
    (run / "quarantine.jsonl").write_text(json.dumps({"shard": "a", "key": "b", "reason": text}) + "\n")
    card = model_card(subject(), run, STATE).partition("## Configuration")[0].partition("\n---\n")[2]
    tokens = [
        each
        for block in MarkdownIt().enable(["table", "strikethrough"]).parse(card)
        for each in [block, *(block.children or [])]
    ]
    assert {each.type for each in tokens} <= {
        *(f"{part}_{end}" for part in BLOCKS for end in ("open", "close")), "inline", "text", "text_special", "code_inline"
    }  # fmt: skip
    shown = ["".join(each.content for each in block.children) for block in tokens if block.children is not None]
    escaped = text.replace("\n", "\\n")
    assert shown[0] == f"{name}/mine", "the title"
    assert {f"{name}/mine", f"eval-{escaped}"} <= {*shown}
    assert f"1 × {escaped}, fp32 (of the last start; those of earlier ones are not recorded)" in shown
    assert f"1 × {escaped}" in shown
    assert len(rows_of(card, "Scores")) == 3 and len(re.findall("^#", card, re.MULTILINE)) == 4
    for live in ("http://", "www."):
        assert live not in re.sub("`.*?`", "", card), "some readers make links of bare addresses"


def test_interpolated_weights_are_not_called_trained(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, interpolated=[[0.75, "runs/a"], [0.25, "runs/b"], [10**400, "?"], "no pair"])
    card = model_card(subject(), run, STATE)
    assert rows_of(card, "Training")["weights"] == ["as trained, after step 3"], "a malformed list says nothing"
    run = evaluated(tmp_path / "other", {}, interpolated=[[0.75, "runs/a"], [0.25, "runs/b"]])
    card = model_card(subject(), run, STATE)
    assert rows_of(card, "Training")["weights"] == ["interpolated: 0.75 × runs/a + 0.25 × runs/b"]
    assert "a sum of several runs' weights" in card


def test_huge_scores_are_short(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {"eval-val/a": 1e308, "eval-val/b": 10**300, "eval-val/c": 123456.0})
    (run / "intervals.json").write_text(json.dumps({"eval-val/a": {"sample": [-1e300, 1e301]}}))
    scores = rows_of(model_card(subject(), run, STATE), "Scores")
    assert scores["eval-val/a"] == ["1e+308", "-1e+300–1e+301"]
    assert (scores["eval-val/b"][0], scores["eval-val/c"][0]) == ("1e+300", "123,456.0000")


def test_parameters_are_those_of_the_exported_model_and_adapters_are_named(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, parameters={"image": 9999, "heads": 1})
    plain = rows_of(model_card(subject(), run, STATE), "Training")
    assert plain["model"][0].endswith("; parameters: image 1,200, text 34") and "LoRA" not in plain
    config = config_yaml.read(run / "config.yaml")
    for rank, row in ((0, None), (8, ["rank 8, alpha 16.0; the adapters are merged into the weights"])):
        config["trainer"]["lora"] = {"rank": rank, "alpha": 16.0}
        (run / "config.yaml").write_text(config_yaml.to_yaml(config))
        assert rows_of(model_card(subject(), run, STATE), "Training").get("LoRA") == row


@pytest.mark.parametrize("processes", [10**400, 0, -8, True, 1_000_001, 8.0, "8", None])
def test_no_energy_is_estimated_of_processes_that_no_run_had(processes: Any, tmp_path: Path) -> None:
    run = evaluated(tmp_path, {}, device="NVIDIA H100 80GB HBM3", processes=processes)
    rows = rows_of(model_card(subject(), run, STATE), "Training")
    assert rows["energy of the run"][0].startswith("unknown: not measured")


@pytest.mark.parametrize("seconds", ["long", -1, True, float("nan"), float("inf"), 10**400, None])
def test_a_wall_time_that_is_none_is_left_out(seconds: Any, tmp_path: Path) -> None:
    run = evaluated(tmp_path, {})
    card = model_card(subject(), run, {**STATE, "step": 2, "wall_seconds": seconds})
    assert rows_of(card, "Training")["length"] == ["2 steps, 48 samples"]
