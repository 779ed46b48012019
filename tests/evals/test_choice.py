"""Choice between captions: SugarCrepe's and Winoground's scores by hand, ties, and fields that are wrong."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.choice import Choice
from tests import tiny
from tests.evals.held_out import embedded, make_context, make_set

WIDTH = tiny.image_text(vocab_size=40).embed_dim
IMAGES = torch.eye(4, WIDTH)


def context(folder: Path, texts: torch.Tensor, **fields: Sequence[Any]) -> Context:
    data = make_set(folder, fields={name: f"json.{name}" for name in fields})
    rows = replace(embedded(IMAGES, texts, [(i, i) for i in range(4)]), fields=fields)
    return make_context(data=data, _embedded={"val": rows})


def test_a_choice_is_right_if_no_wrong_caption_is_as_similar(tmp_path: Path) -> None:
    negatives = ["one wrong caption", ["a", "b"], ["c"], "d"]
    found = context(tmp_path, torch.zeros(4, WIDTH), negatives=negatives)
    wrong = found.embedded_texts(["one wrong caption", "a", "b", "c", "d"])
    # As similar as the wrong one (a tie), between two wrong ones, above, and far above.
    own = [wrong[0, 0], (wrong[1, 1] + wrong[2, 1]) / 2, wrong[3, 2] + 0.01, wrong[4, 3] + 0.5]
    texts = torch.zeros(4, WIDTH)
    texts[range(4), range(4)] = torch.stack(own)
    found._embedded["val"] = replace(found._embedded["val"], texts=texts)
    scores = evaluate({"choice": Choice()}, found)
    assert scores == {"eval-val/choice_acc": 0.5}
    assert set(scores["eval-val/choice_acc"].intervals) == {"sample"}
    found._embedded["val"] = replace(found._embedded["val"], labels=torch.tensor([0, 0, 1, 1]))
    scores = evaluate({"choice": Choice()}, found)
    assert set(scores["eval-val/choice_acc"].intervals) == {"sample", "class"}


def test_pairs_have_winogrounds_scores(tmp_path: Path) -> None:
    # Rows are texts, columns images. In the first pair each text is nearest to its own image, and each image to its text.
    # In the second, both images prefer text 3, and both texts prefer their own image.
    texts = torch.zeros(4, WIDTH)
    texts[0, :2], texts[1, :2] = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    texts[2, 2:4], texts[3, 2:4] = torch.tensor([0.3, 0.2]), torch.tensor([0.4, 0.5])
    found = context(tmp_path, texts, pair=["x", "x", 7, 7])
    found._embedded["val"] = replace(found._embedded["val"], texts=texts)
    scores = evaluate({"choice": Choice()}, found)
    assert scores == {
        "eval-val/winoground_text": 0.5, "eval-val/winoground_image": 1.0, "eval-val/winoground_group": 0.5,
    }  # fmt: skip


def test_a_collapsed_model_is_never_right(tmp_path: Path) -> None:
    found = context(tmp_path, torch.ones(4, WIDTH), negatives=["a"] * 4, pair=[1, 1, 2, 2])
    found._embedded["val"] = replace(found._embedded["val"], images=torch.zeros(4, WIDTH))
    assert set(evaluate({"choice": Choice()}, found).values()) == {0.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negatives": ["a", 3, "b", "c"]}, r"data.val.val.fields.negatives: 3; expected a text, or a list of texts"),
        ({"negatives": ["a", [], "b", "c"]}, r"data.val.val.fields.negatives: \[\]; expected"),
        ({"pair": ["a", "a", "b", "c"]}, r"data.val.val.fields.pair: 'b' occurs in 1 samples; expected two"),
    ],
)
def test_fields_of_another_form_are_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate({"choice": Choice()}, context(tmp_path, F.normalize(torch.randn(4, WIDTH), dim=1), **fields))


def test_fields_are_read_from_json(tmp_path: Path) -> None:
    data = make_set(tmp_path, fields={"negatives": "json.label", "group": "json.number"})
    found = make_context(data=data)
    scores = evaluate({"choice": Choice()}, found)
    assert 0 <= scores["eval-val/choice_acc"] <= 1
    assert found.embedded("val").fields["negatives"][:2] == ["cat", "dog"]
    assert Choice().applicable_datasets(make_context(data=make_set(tmp_path))) == []
