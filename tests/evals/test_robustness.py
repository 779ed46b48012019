"""Zero-shot classification under corruptions, by hand, and of a collapsed model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpretrain import seeds
from mmpretrain.data.corruptions import corrupt
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate, evenly_spread
from mmpretrain.evals.embeddings import Classes
from mmpretrain.evals.robustness import Robustness
from mmpretrain.evals.zero_shot import class_embeddings
from tests.evals.held_out import make_context, make_set

CLASSES = Classes([str(i) for i in range(40)], [[f"a {i}", f"number {i}"] for i in range(40)])
CHOSEN = ("contrast", "gaussian_noise", "fog")


def context(folder: Path, batch_size: int = 4, workers: int = 0) -> Context:
    """A context in which each image has the class that the model predicts for it."""
    found = make_context(data=make_set(folder, label="cls", classes=CLASSES), batch_size=batch_size, workers=workers)
    rows = found.embedded("val")
    predicted = (rows.images @ class_embeddings(CLASSES, found).T).argmax(1)
    return replace(found, _embedded={"val": replace(rows, labels=predicted)})


def test_samples_of_large_sets_are_spread_to_the_last() -> None:
    total = (1 << 25) + 4
    rows = evenly_spread(10_000, total)
    assert rows[0] == 0 and rows[-1] == total - 1 and len(set(rows)) == 10_000
    assert evenly_spread(5, 3) == evenly_spread(None, 3) == [0, 1, 2]


def test_each_variant_of_each_image_is_classified(tmp_path: Path) -> None:
    found = context(tmp_path)
    scores = evaluate({"robustness": Robustness(corruptions=CHOSEN, severities=(1, 5), max_samples=9)}, found)
    embedded, weights = found.embedded("val"), class_embeddings(CLASSES, found)
    rows = evenly_spread(9, len(embedded.images))
    hits = torch.zeros(len(rows), len(CHOSEN), 2)
    for i, row in enumerate(rows):
        image = found.image("val", row).permute(1, 2, 0).numpy()
        seed = seeds.hash64("robustness", int(embedded.samples[row]))
        for j, name in enumerate(CHOSEN):
            for k, severity in enumerate((1, 5)):
                pixels = torch.from_numpy(corrupt(image, name, severity, seed)).permute(2, 0, 1)[None]
                hits[i, j, k] = (found.model.embed_images(pixels) @ weights.T).argmax() == embedded.labels[row]
    assert 0 < hits.mean() < 1
    assert scores["eval-val/corrupted_acc1"] == pytest.approx(float(hits.mean()))
    assert scores["eval-val/corrupted_acc1_drop"] == pytest.approx(1 - float(hits.mean()))
    for j, name in enumerate(CHOSEN):
        assert scores[f"eval-val/corrupted_acc1_{name}"] == pytest.approx(float(hits[:, j].mean()))
    for k, severity in enumerate((1, 5)):
        assert scores[f"eval-val/corrupted_acc1@{severity}"] == pytest.approx(float(hits[:, :, k].mean()))
    low, high = scores["eval-val/corrupted_acc1"].intervals["sample"]
    assert low < hits.mean() < high


def test_batches_and_workers_change_no_score(tmp_path: Path) -> None:
    evaluator = Robustness(corruptions=("shot_noise", "snow"), severities=(3,), max_samples=None)
    expected = evaluate({"robustness": evaluator}, context(tmp_path))
    assert evaluate({"robustness": evaluator}, context(tmp_path, batch_size=7, workers=2)) == expected


def test_a_collapsed_model_has_no_hit(tmp_path: Path) -> None:
    found = context(tmp_path)
    with torch.no_grad():
        assert found.model.image_projection is not None
        found.model.image_projection.weight.zero_()
    constant = replace(found._embedded["val"], images=torch.zeros_like(found._embedded["val"].images))
    found = replace(found, _embedded={"val": constant})
    scores = evaluate({"robustness": Robustness(corruptions=CHOSEN, severities=(1,))}, found)
    assert set(scores.values()) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruptions": ["fogg"]}, r"^corruptions has 'fogg'; did you mean 'fog'\?$"),
        ({"corruptions": []}, r"^corruptions is \[\]; expected at least one, and each once$"),
        ({"severities": [1, 1]}, r"^severities is \[1, 1\]; expected at least one, and each once$"),
        ({"severities": [6]}, r"^severities is 6; expected a number at least 1 and at most 5"),
        ({"max_samples": 0}, r"^max_samples is 0; expected a number at least 1"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Robustness(**arguments)  # type: ignore[arg-type]
