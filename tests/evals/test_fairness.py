"""Scores by group: means of the group's images, the worst one, and the gap."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpretrain.data.classes import Classes
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.fairness import Fairness
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score
from tests.evals.held_out import LABELS, embedded, make_context, make_set

CLASSES = Classes(LABELS, [[name] for name in LABELS])
GROUPS = ["a"] * 4 + ["b/c"] * 4 + ["small"]


def test_groups_have_the_accuracy_of_their_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_set(tmp_path, label="cls", classes=CLASSES, fields={"group": "json.group"})
    context = make_context(data=data)
    texts = class_embeddings(CLASSES, context)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
    predicted = torch.tensor([0, 1, 2, 1, 1, 0, 0, 0, 0])
    rows = replace(embedded(texts[predicted], texts[:0], []), labels=labels, fields={"group": GROUPS})
    context = replace(context, _embedded={"val": rows})
    scores = evaluate({"fairness": Fairness(min_samples=4)}, context)
    assert scores == {
        "eval-val/group_acc1_a": 0.75, "eval-val/group_acc1_b_c": 0.5, "eval-val/worst_group_acc1": 0.5,
        "eval-val/group_acc1_gap": 0.25,
    }  # fmt: skip
    assert set(scores["eval-val/worst_group_acc1"].intervals) == {"sample"}
    assert evaluate({"fairness": Fairness(min_samples=10)}, context) == {}
    assert "data.val.val: no group has eval.fairness.min_samples = 10 images; the largest has " in caplog.text


def test_without_classes_the_captions_of_the_images_are_sought(tmp_path: Path) -> None:
    texts = torch.eye(3, 4)
    images = texts[[0, 1, 1, 0]]
    rows = embedded(images, texts, [(0, 0), (1, 1), (2, 2), (3, 0)])
    rows = replace(rows, fields={"group": ["x", "x", "y", "y"]})
    data = make_set(tmp_path, fields={"group": "json.group"})
    scores = evaluate({"fairness": Fairness(min_samples=2)}, make_context(data=data, _embedded={"val": rows}))
    assert scores["eval-val/group_text_retrieval_recall@1_x"] == 1
    assert scores["eval-val/group_text_retrieval_recall@1_gap"] == 0.5


def by_groups(folder: Path, groups: Sequence[Any]) -> dict[str, Score]:
    rows = replace(embedded(torch.eye(4), torch.eye(4), [(i, i) for i in range(4)]), fields={"group": groups})
    data = make_set(folder, fields={"group": "json.group"})
    return evaluate({"fairness": Fairness(min_samples=2)}, make_context(data=data, _embedded={"val": rows}))


def test_null_is_no_group(tmp_path: Path) -> None:
    scores = by_groups(tmp_path, ["None", None, None, "None"])
    assert [name for name in scores if "/group_" in name] == [
        "eval-val/group_text_retrieval_recall@1_None", "eval-val/group_text_retrieval_recall@1_gap",
    ]  # fmt: skip
    assert by_groups(tmp_path, [None] * 4) == {}


@pytest.mark.parametrize("groups", [["a/b", "a/b", "a_b", "a_b"], [1, "1", 1, "1"], ["x", "x", True, "True"]])
def test_groups_of_one_name_are_refused(tmp_path: Path, groups: list[Any]) -> None:
    with pytest.raises(
        UsageError, match=r"^data.val.val.fields.group: .+ and .+ are both named .+; expected groups.*$"
    ):
        by_groups(tmp_path, groups)


def test_it_needs_the_field_and_classes_or_captions(tmp_path: Path) -> None:
    fields = {"group": "json.number"}
    for lacking in (make_set(tmp_path), make_set(tmp_path, caption=None, fields=fields)):
        assert Fairness().applicable_datasets(make_context(data=lacking)) == []
    assert Fairness().applicable_datasets(make_context(data=make_set(tmp_path, fields=fields))) == ["val"]
