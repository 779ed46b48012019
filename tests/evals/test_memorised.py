"""Memorised pairs, by a double loop over all pairs, and of models that memorise everything or nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpretrain.evals.base import evaluate
from mmpretrain.evals.embeddings import Embedded
from mmpretrain.evals.memorised import Memorised
from mmpretrain.scores import Score
from tests.evals.held_out import BROKEN, NUM_SAMPLES, WITHOUT_CAPTION, captions, embedded, make_context, make_set

N = 21  # readable samples of the data set, which bound those of the training split


def of(images: Tensor, texts: Tensor, words: Sequence[str]) -> Embedded:
    """Images with one caption each, in their order."""
    return replace(embedded(images, texts, [(i, i) for i in range(len(images))]), captions=words)


def scores_of(folder: Path, val: Embedded, train: Embedded, evaluator: Memorised | None = None) -> dict[str, Score]:
    data = make_set(folder)
    cached = {"val": val, f"val.train of {len(val.images)} pairs": train}
    context = make_context(data=replace(data, train=data.shards), _embedded=cached)
    found = evaluate({"memorised": evaluator or Memorised()}, context)
    return {name.removeprefix("eval-val/memorised_"): score for name, score in found.items()}


def test_the_scores_are_those_of_a_double_loop(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts, train_images, train_texts = (torch.randn(40, 8, generator=generator) for _ in range(4))
    texts += 0.8 * images
    train_texts += 1.5 * train_images
    train_texts[7] = texts[3]  # a caption of both splits
    val = of(images, texts, [f"v{i}" for i in range(40)])
    train = of(train_images, train_texts, [f"t{i}" if i != 7 else "v3" for i in range(40)])
    found = scores_of(tmp_path, val, train)

    def recall(data: Embedded) -> float:
        similarities = (data.images.double() @ data.texts.double().T).numpy()
        return float((similarities.argmax(1) == np.arange(40)).mean())

    nearest = []
    for i in range(40):
        others = [float(val.images[i] @ train.texts[j]) for j in range(40) if train.captions[j] != val.captions[i]]
        nearest.append(max(others) >= float(val.images[i] @ val.texts[i]))
    assert found["train_recall@1"] == pytest.approx(recall(train)) and 0.1 < recall(train) < 1
    assert found["val_recall@1"] == pytest.approx(recall(val)) and 0.1 < recall(val) < recall(train)
    assert found["gap"] == pytest.approx(recall(train) - recall(val))
    assert found["caption_rate"] == pytest.approx(np.mean(nearest)) and 0 < np.mean(nearest) < 1
    assert scores_of(tmp_path, val, train, Memorised(chunk_size=7)) == found


def test_intervals_by_class_are_of_the_labels_of_each_split(tmp_path: Path) -> None:
    rows = [of(torch.eye(N), torch.eye(N), [f"{split}{i}" for i in range(N)]) for split in "vt"]
    val = replace(rows[0], labels=torch.arange(N) % 3)
    found = scores_of(tmp_path, val, rows[1])
    assert {name: set(score.intervals) for name, score in found.items()} == {
        "train_recall@1": {"sample"}, "val_recall@1": {"sample", "class"}, "gap": {"sample"},
        "caption_rate": {"sample", "class"},
    }  # fmt: skip


def test_both_splits_have_as_many_distinct_captions(tmp_path: Path) -> None:
    """Three captions of six held-out images: of the training pairs the first, the middle and the last are taken."""
    texts = torch.eye(7)[:3]
    val = replace(
        embedded(torch.eye(7)[[0, 0, 1, 1, 2, 2]], texts, [(i, i // 2) for i in range(6)]), captions=list("abc")
    )
    train = of(torch.eye(7)[[3, 0, 4, 0, 5]], torch.eye(7)[[3, 4, 4, 4, 5]], list("vwxyz"))
    train.texts[1] = train.texts[3] = 0
    found = scores_of(tmp_path, val, train)
    assert found["train_recall@1"] == 1, "the second and the fourth, which are misses, are left out"
    assert found["val_recall@1"] == 1


def test_a_collapsed_model_recalls_nothing(tmp_path: Path) -> None:
    constant = of(torch.full((N, 4), 0.3), torch.full((N, 4), 0.7), [str(i) for i in range(N)])
    other = replace(constant, captions=[f"t{i}" for i in range(N)])
    found = scores_of(tmp_path, constant, other)
    assert found == {"train_recall@1": 0, "val_recall@1": 0, "gap": 0, "caption_rate": 1}


def test_a_model_that_knows_the_training_pairs_alone_has_the_largest_gap(tmp_path: Path) -> None:
    known, same = torch.eye(N), torch.ones(N, N)
    words = [str(i) for i in range(N)]
    found = scores_of(tmp_path, of(same, same, words), of(known, known, [f"t{i}" for i in range(N)]))
    assert (found["train_recall@1"], found["val_recall@1"], found["gap"]) == (1, 0, 1)
    found = scores_of(tmp_path, of(same, same, words), of(same, same, words))
    assert found["caption_rate"] == 1


def test_the_training_split_is_read_with_its_captions(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    context = make_context(data=replace(data, train=data.shards))
    assert Memorised().applicable_datasets(context) == ["val"]
    assert Memorised().applicable_datasets(make_context(data=data)) == []
    found = evaluate({"memorised": Memorised()}, context)
    whole = context.embedded("val")
    assert len(whole.images) == N == NUM_SAMPLES - len({BROKEN, WITHOUT_CAPTION})
    part = context.embedded_train_pairs("val", N)
    chosen = torch.linspace(0, NUM_SAMPLES - 1, N).round().long().tolist()
    kept = [number for number in chosen if number not in (BROKEN, WITHOUT_CAPTION)]
    assert set(part.captions) == {caption for number in kept for caption in captions(number)}
    of_whole = {int(sample): row for sample, row in zip(whole.samples, whole.images)}
    torch.testing.assert_close(part.images, torch.stack([of_whole[number] for number in kept]), rtol=1e-4, atol=1e-5)
    assert found["eval-val/memorised_gap"] == pytest.approx(
        found["eval-val/memorised_train_recall@1"] - found["eval-val/memorised_val_recall@1"]
    )
    assert context.embedded_train("val").captions == [], "other evaluators embed no captions of the training split"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_samples is 0; expected a number at least 1"):
        Memorised(max_samples=0)
